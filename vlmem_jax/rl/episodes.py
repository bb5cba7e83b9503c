"""What a play gives to learn from: groups of episodes, and the steps that these are made of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from vlmem_jax.data.samples import Key
from vlmem_jax.generate import Invocation
from vlmem_jax.types import IGNORED, Sample


@dataclasses.dataclass(frozen=True)
class Step:
    """What was drawn behind a prompt, on the host: T tokens, the one that ended it included."""

    prompt: Sample
    tokens_T: Int32[np.ndarray, "T"]
    logp_T: Float32[np.ndarray, "T"]
    """Log-probability of each token when it was drawn, see `generate.sampling.choose`; NaN where nobody drew it."""
    loss_T: Bool[np.ndarray, "T"]
    """Which tokens the policy drew; the others were put there and teach nothing."""
    stopped: bool
    """Whether a stop id ended it; if not, it was cut off."""
    invocations: tuple[Invocation, ...] = ()
    """By their places."""
    weight: float = 1.0
    """Its share of the loss among the steps of its episode, which should add up to 1 where means are per sequence."""

    @property
    def output_T(self) -> Int32[np.ndarray, "T"]:
        """The tokens without the stop id."""
        return self.tokens_T[:-1] if self.stopped else self.tokens_T

    @property
    def index_T(self) -> Int32[np.ndarray, "T"]:
        """The place of each token among all that followed the prompt, latent ones included."""
        index_T = np.arange(len(self.tokens_T), dtype=np.int32)
        for memory in self.invocations:
            index_T[memory.place :] += memory.latents
        return index_T

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of the prompt and of all that followed, latent ones included, and tiles."""
        return len(self.prompt.tokens_T) + int(self.index_T[-1]) + 1, len(self.prompt.pixels_ISSc)

    def sample(self) -> Sample:
        """Prompt and tokens, and room for latent ones, as a training sample whose targets are the drawn tokens."""
        prompt, index_T = self.prompt, self.index_T
        count = int(index_T[-1]) + 1
        positions = prompt.positions_T.max() + 1 + np.arange(count, dtype=np.int32)
        if prompt.positions_T.ndim == 2:
            positions = np.repeat(positions[:, None], prompt.positions_T.shape[1], axis=1)
        tokens, labels = np.zeros(count, np.int32), np.full(count, IGNORED, np.int32)
        tokens[index_T] = self.tokens_T
        labels[index_T] = np.where(self.loss_T, self.tokens_T, np.int32(IGNORED))
        return dataclasses.replace(
            prompt,
            tokens_T=np.concatenate([prompt.tokens_T, tokens]),
            labels_T=np.concatenate([np.full_like(prompt.tokens_T, IGNORED), labels]),
            positions_T=np.concatenate([prompt.positions_T, positions]),
            visual_index_T=np.concatenate([prompt.visual_index_T, np.full(count, -1, np.int32)]),
        )

    def followed_by(self, ids: Sequence[int]) -> Sample:
        """Prompt, what was drawn and `ids`, as the prompt of the next step. Raises ValueError where memories stand in
        what was drawn, which nothing can be drawn behind."""
        if self.invocations:
            raise ValueError(f"a step with memories must be the last of its episode (sample {self.prompt.name})")
        tokens_T = np.concatenate([self.tokens_T, np.array(ids, np.int32)])
        nothing = np.zeros(len(tokens_T), np.float32), np.zeros(len(tokens_T), bool)
        return Step(self.prompt, tokens_T, *nothing, stopped=False).sample()


@dataclasses.dataclass(frozen=True)
class Episode:
    """What was played from one prompt: steps, one after the other, and what they earned together."""

    steps: tuple[Step, ...]
    reward: float
    """What it is compared by with the others of its group."""
    parts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the reward is made of, by name; all episodes of a phase have the same."""


class Played(NamedTuple):
    """What came of a phase's prompts."""

    groups: list[list[Episode]]
    """Of each prompt."""
    failed: int = 0
    """Outputs for which a reward failed."""
    numbers: dict[str, float] = {}
    """More to record."""


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What is to be learned from an episode."""

    key: Key
    """Of its prompt."""
    steps: tuple[Step, ...]
    advantage: float
    """Of each of them."""
