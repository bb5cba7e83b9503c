"""Training and evaluation data: JSONL files to packed batches on the devices."""

from vlmem_jax.data.config import DataConfig, SourceConfig
from vlmem_jax.data.pipeline import EvalData, HostBatch, TrainData, local_rows, to_device
from vlmem_jax.data.plan import Plan
from vlmem_jax.data.prompts import Prompt, Prompts
from vlmem_jax.data.stored import store

__all__ = [
    "DataConfig",
    "EvalData",
    "HostBatch",
    "Plan",
    "Prompt",
    "Prompts",
    "SourceConfig",
    "TrainData",
    "local_rows",
    "store",
    "to_device",
]
