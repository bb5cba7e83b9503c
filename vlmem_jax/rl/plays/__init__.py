"""What is played with a prompt to learn from it. How a memory is trained by reward is one file, and one line here."""

from collections.abc import Callable

from vlmem_jax.models import VLM
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.rl.plays.base import Play
from vlmem_jax.rl.plays.text import Answers
from vlmem_jax.rl.plays.vismem import WithMemories
from vlmem_jax.train.config import Experiment, StageConfig

MakePlay = Callable[[Experiment, StageConfig, VLM], Play]

PLAYS: dict[str, MakePlay] = {"vismem": WithMemories}
"""What makes the play of a memory, by its kind; single answers are played with all others. `check(experiment, stage)`
of it raises ConfigError where a stage cannot be trained."""

__all__ = ["PLAYS", "Answers", "MakePlay", "Play", "WithMemories", "play_of"]


def play_of(config: ModelConfig) -> MakePlay:
    """What makes the play for models with this config."""
    return PLAYS.get(config.memory_kind, Answers)
