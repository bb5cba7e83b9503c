"""How well a model answers: our own evaluation on JSONL files, and an adapter to lmms-eval."""

from vlmem_jax.evals.config import EvalConfig
from vlmem_jax.evals.run import evaluate
from vlmem_jax.evals.summary import table

__all__ = ["EvalConfig", "evaluate", "table"]
