"""Reinforcement learning from rewards: GRPO on rollouts of the model that is trained."""

from vlmem_jax.rl.config import RLConfig
from vlmem_jax.rl.task import GRPO, GRPOLoss

TASKS = {"grpo": GRPO}
"""Tasks for `train.run.run`, beside its own."""

__all__ = ["GRPO", "TASKS", "GRPOLoss", "RLConfig"]
