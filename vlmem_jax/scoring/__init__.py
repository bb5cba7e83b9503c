"""What an answer is worth: scores of outputs, for learning, evaluation and agents alike."""

from vlmem_jax.scoring.rewards import RewardConfig, RewardError, Rewards

__all__ = ["RewardConfig", "RewardError", "Rewards"]
