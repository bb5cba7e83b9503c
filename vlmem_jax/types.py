"""The data that crosses package borders: one sample on the host, one packed batch on the device."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt8

IGNORED = -100
"""Label of a token that is not a training target."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation ready for the model, on the host.

    T tokens, I tiles of S x S pixels, P visual tokens a tile, M = I * P memory slots.
    """

    tokens_T: Int32[np.ndarray, "T"]
    labels_T: Int32[np.ndarray, "T"]
    """The token itself where it is a target, IGNORED elsewhere; not shifted."""
    positions_T: Int32[np.ndarray, "T"]
    """Rotary position; repeats under RoPE-DHR."""
    slots_T: Int32[np.ndarray, "T"]
    """Which of the sample's M visual tokens replaces this token's embedding; -1 for text."""
    pixels_ISSc: UInt8[np.ndarray, "I S S 3"]
    memory_positions_M: Int32[np.ndarray, "M"]
    """Rotary position of each visual token as a memory key."""
    name: str = ""
    """Where the sample came from, as `file:line`, for error messages."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed samples, for training, evaluation and rollouts alike.

    B rows, T token slots, I tile slots, M = I * P memory slots. Tokens and tiles are packed on separate axes; a
    segment id says to which sample of its row a slot belongs: 1, 2, ... and 0 for padding. Token padding follows the
    tokens, tile padding the tiles. `...` is empty or a leading axis of gradient accumulation.
    """

    tokens_BT: Int32[Array, "... B T"]
    targets_BT: Int32[Array, "... B T"]
    """The token that position t must predict, that is the next one; 0 where the weight is 0."""
    weights_BT: Float32[Array, "... B T"]
    """Weight of that target in the loss."""
    positions_BT: Int32[Array, "... B T"]
    segments_BT: Int32[Array, "... B T"]
    slots_BT: Int32[Array, "... B T"]
    """Which of the row's M visual tokens replaces this token's embedding; -1 for text."""
    pixels_BISSc: UInt8[Array, "... B I S S 3"]
    memory_positions_BM: Int32[Array, "... B M"]
    memory_segments_BM: Int32[Array, "... B M"]
