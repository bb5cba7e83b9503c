"""What is played with a prompt to learn from it. How a memory is trained by reward is one file, and one line here."""

from collections.abc import Callable

from vlmem_jax.models import VLM
from vlmem_jax.rl.config import rl_config
from vlmem_jax.rl.plays.base import Play
from vlmem_jax.rl.plays.text import Answers
from vlmem_jax.rl.plays.vismem import WithMemories
from vlmem_jax.scoring.rewards import imported
from vlmem_jax.train.config import Experiment, StageConfig

MakePlay = Callable[[Experiment, StageConfig, VLM], Play]

PLAYS: dict[str, MakePlay] = {"vismem": WithMemories}
"""What makes the play of a memory, by its kind; single answers are played with all others. A `check(experiment, stage)`
that it has raises ConfigError where a stage cannot be trained by it."""

__all__ = ["PLAYS", "Answers", "MakePlay", "Play", "WithMemories", "play_of"]


def play_of(experiment: Experiment, stage: StageConfig) -> MakePlay:
    """What makes the play of a stage. Raises ConfigError if `task.play` names none."""
    if name := rl_config(stage).play:
        return imported(name, f"config.stages.{stage.name}.task.play")
    return PLAYS.get(experiment.model.memory_kind, Answers)
