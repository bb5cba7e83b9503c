"""Learning from prompts: GRPO on rollouts of the model that is trained, and a supervised warm-up of its memory."""

from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.objective import GRPOLoss
from vlmem_jax.rl.sft import MemorySFT
from vlmem_jax.rl.task import GRPO

TASKS = {"grpo": GRPO, "memory_sft": MemorySFT}
"""Tasks for `train.run.run`, beside its own."""

__all__ = ["GRPO", "TASKS", "GRPOLoss", "MemorySFT", "RLConfig"]
