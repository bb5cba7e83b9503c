"""A group as one row: a prompt and what it shows once, behind it the answers, each of which sees the prompt and itself.

    tokens    p0 ... pn-1 | pn a0 a1 ... | pn b0 b1 ... | padding
    segments  1           | 2            | 3            | 0
    prefix    0           | 1            | 1            | 0

The last token of the prompt predicts another token for each answer, so it stands at the head of each of them. Positions
begin again behind the prompt, so an answer has the log-probabilities that it has in a row of its own.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row, sample_weight
from vlmem_jax.models import VLM
from vlmem_jax.types import IGNORED, Batch, Sample, TileShape


@dataclasses.dataclass(frozen=True)
class Answer:
    """What followed a prompt, on the host: text alone, T tokens, the one that ended it included."""

    tokens_T: Int[np.ndarray, "T"]
    loss_T: Bool[np.ndarray, "T"]
    """Which tokens the policy drew; the others were put there and teach nothing."""


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """What a row has room for, whatever was drawn: every group of a stage gives arrays of one shape."""

    tokens: int
    """T: of the prompt and of all answers."""
    tiles: int
    """I."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A row of numpy arrays without the axis B, and where in it the answers are scored."""

    batch: Batch
    answers: tuple[slice, ...]
    """The slots of each answer: token n of an answer is the target of slot n of its slice."""

    def spread(self, values: Sequence[Shaped[np.ndarray, "..."]]) -> Float[np.ndarray, "T"]:
        """What is known of each token of each answer, fp32, at the slots whose targets they are; zeros elsewhere, and
        at tokens of no weight."""
        weights_T = self.batch.text.weights_BT
        known_T = np.zeros(weights_T.shape, np.float32)
        for slots, value_T in zip(self.answers, values, strict=True):
            known_T[slots] = np.where(weights_T[slots] > 0, value_T, 0)
        return known_T


def pack_group(
    prompt: Sample,
    answers: Sequence[Answer],
    vlm: VLM,
    shape: GroupShape,
    data: DataConfig,
    tile: TileShape | None = None,
) -> Group:
    """The row of a prompt and its answers, of which there may be any number that fits.

    `data.loss_weight` weights the targets of each answer. `tile`: that of the processor of the prompt, by default the
    model's. Raises ValueError for a group that is larger than `shape`, a prompt or an answer without tokens, and where
    the length of a sample would stretch its rotary positions (dynamic NTK), as each answer had its own then.
    """
    n, lengths = len(prompt.tokens_T), [len(answer.tokens_T) for answer in answers]
    if not n or 0 in lengths:
        raise ValueError(f"a prompt and each of its answers must have tokens, got {n} and {lengths}")
    tokens, tiles = n - 1 + sum(lengths), len(prompt.pixels_ISSc)
    where = f" (sample {prompt.name})" if prompt.name else ""
    if tokens > shape.tokens or tiles > shape.tiles:
        raise ValueError(
            f"a row must hold a group, a prompt of {n} tokens and {tiles} tiles with {len(answers)} answers of "
            f"{sum(lengths)} tokens, but it has {shape.tokens} token slots and {shape.tiles} tile slots{where}; raise "
            "these, or draw fewer or shorter answers"
        )
    c = vlm.config.decoder
    if c.ntk_factor > 0 and n + max(lengths, default=0) > c.max_positions:
        raise ValueError(
            f"answers share a prompt up to model.decoder.max_positions={c.max_positions} tokens, beyond which rotary "
            f"frequencies are those of each length, got {n} + {max(lengths)}{where}; put each answer into a row of its "
            "own"
        )
    begun = dataclasses.replace(
        prompt,
        tokens_T=prompt.tokens_T[:-1],
        labels_T=np.full(n - 1, IGNORED, np.int32),
        positions_T=prompt.positions_T[:-1],
        visual_index_T=prompt.visual_index_T[:-1],
    )
    row = pack_row([begun], data, tile or vlm.tile, shape.tokens, shape.tiles)
    text = row.text
    prefix_T, start, places = np.zeros_like(text.segments_BT), n - 1, []
    for segment, (answer, length) in enumerate(zip(answers, lengths, strict=True), 2):
        slots = slice(start, start + length)
        text.tokens_BT[slots] = [prompt.tokens_T[-1], *answer.tokens_T[:-1]]
        text.segments_BT[slots], prefix_T[slots] = segment, 1
        text.positions_BT[start] = prompt.positions_T[-1]
        after = prompt.positions_T.max() + 1 + np.arange(length - 1, dtype=np.int32)
        text.positions_BT[start + 1 : slots.stop] = after if text.positions_BT.ndim == 1 else after[:, None]
        text.visual_index_BT[start] = prompt.visual_index_T[-1]
        text.targets_BT[slots] = np.where(answer.loss_T, answer.tokens_T, 0)
        weight = sample_weight(data.loss_weight, int(answer.loss_T.sum()))
        text.weights_BT[slots] = answer.loss_T * weight
        places.append(slots)
        start = slots.stop
    return Group(row.replace(prefix_BT=prefix_T), tuple(places))
