"""A group as one row: a prompt and what it shows once, behind it the answers, each of which sees the prompt and itself.

    tokens    p0 ... pn-1 | pn a0 a1 ... | pn b0 b1 ... | padding
    segments  1           | 2            | 3            | 0
    prefix    0           | 1            | 1            | 0

The last token of the prompt predicts another token for each answer, so it stands at the head of each of them. Positions
begin again behind the prompt, so an answer has the log-probabilities that it has in a row of its own.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row, sample_weight
from vlmem_jax.types import IGNORED, Batch, Sample, TileShape


class Group(NamedTuple):
    """What shares a prompt, on the host."""

    prompt: Sample
    answers: Sequence[Sample]
    """The prompt with each of the answers behind it; labels are the drawn tokens."""

    @property
    def lengths(self) -> list[int]:
        """Slots of each answer."""
        return [len(answer.tokens_T) - len(self.prompt.tokens_T) for answer in self.answers]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and tiles that it takes of a row."""
        return len(self.prompt.tokens_T) - 1 + sum(self.lengths), len(self.prompt.pixels_ISSc)

    def joined(self) -> Sample:
        """All of it as one sample, from which nothing is learned."""
        n, each = len(self.prompt.tokens_T), [self.prompt, *self.answers]

        def slots(name: str) -> np.ndarray:
            return np.concatenate([getattr(sample, name)[n - 1 if g else 0 : -1] for g, sample in enumerate(each)])

        names = "tokens_T", "positions_T", "visual_index_T"
        arrays = {name: slots(name) for name in names}
        return dataclasses.replace(self.prompt, **arrays, labels_T=np.full_like(arrays["tokens_T"], IGNORED))


def pack_groups(
    groups: Sequence[Group], data: DataConfig, tile: TileShape, tokens: int, tiles: int
) -> tuple[Batch, list[slice]]:
    """A row of groups, as numpy arrays without the axis B, and the slots of each answer, one group after the other:
    token n of an answer is the target of slot n of its slice.

    T = `tokens`, I = `tiles`. `data.loss_weight` weights the targets of each answer. Raises ValueError for groups that
    are larger, and for a prompt or an answer without tokens.
    """
    for group in groups:
        if not len(group.prompt.tokens_T) or min(group.lengths, default=1) < 1:
            raise ValueError(
                "a prompt and each of its answers must have tokens, got "
                f"{len(group.prompt.tokens_T)} and {group.lengths} (sample {group.prompt.name})"
            )
    sizes = np.array([group.size for group in groups]).reshape(-1, 2).sum(0)
    if sizes[0] > tokens or sizes[1] > tiles:
        raise ValueError(
            f"a row must hold {len(groups)} prompts with their answers, {sizes[0]} tokens and {sizes[1]} tiles, but it "
            f"has {tokens} token slots and {tiles} tile slots; raise these, or draw fewer or shorter answers"
        )
    row = pack_row([group.joined() for group in groups], data, tile, tokens, tiles)
    text, prefix_T, places = row.text, np.zeros(tokens, np.int32), []
    shown_M = row.views.segments_BM.copy()
    start, segments = 0, itertools.count(1)
    for number, group in enumerate(groups, 1):
        n, prompt_segment = len(group.prompt.tokens_T), next(segments)
        row.views.segments_BM[shown_M == number] = prompt_segment
        text.segments_BT[start : start + n - 1] = prompt_segment
        start += n - 1
        for answer, length in zip(group.answers, group.lengths, strict=True):
            slots = slice(start, start + length)
            text.segments_BT[slots], prefix_T[slots] = next(segments), prompt_segment
            is_target_T = answer.labels_T[n:] != IGNORED
            text.targets_BT[slots] = np.where(is_target_T, answer.labels_T[n:], 0)
            text.weights_BT[slots] = is_target_T * sample_weight(data.loss_weight, int(is_target_T.sum()))
            places.append(slots)
            start = slots.stop
    return row.replace(prefix_BT=prefix_T), places
