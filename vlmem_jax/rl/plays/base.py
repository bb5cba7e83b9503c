"""What a play is to GRPO."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Array, Float

from vlmem_jax.rl.actor import Actor
from vlmem_jax.rl.episodes import Played, Step
from vlmem_jax.rl.stream import Loaded
from vlmem_jax.types import Sample


class Play(Protocol):
    """What is played with prompts. It depends on its arguments alone, and keeps nothing."""

    labels: tuple[int, ...]
    """The ids among which all steps are drawn, see `Actor.decide`; empty: all that answers are drawn of."""

    def play(self, actor: Actor, prompts: Sequence[Loaded], keys_PG: Array, phase: int) -> Played:
        """G episodes of each prompt, each drawn with its random key. Raises RewardError, on every host, where a reward
        failed on one."""

    def evaluate(self, actor: Actor, prompts: Sequence[Loaded], keys_P1: Array, step: int) -> Float[np.ndarray, "P"]:
        """The score of one greedy episode of each prompt, by the parameters of a step of the stage."""

    def prompt(self, loaded: Loaded, before: Sequence[Step]) -> Sample:
        """What the step of an episode stands behind that comes after those `before`. So a checkpoint keeps what was
        drawn alone."""
