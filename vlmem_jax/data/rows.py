"""Samples to a packed row: arrays of fixed shape, targets and loss weights shifted on the host."""

from collections.abc import Sequence

import numpy as np

from vlmem_jax.data.config import DataConfig
from vlmem_jax.data.samples import Size
from vlmem_jax.types import IGNORED, Batch, Sample


def sample_weight(kind: str, targets: int) -> np.float32:
    """Loss weight of each of the `targets` target tokens of a sample, by `data.loss_weight` (CoMemo sec. 4)."""
    return np.float32({"token": 1.0, "sample": 1 / max(targets, 1), "square": max(targets, 1) ** -0.5}[kind])


def blank_sample(size: Size, tokens_per_tile: int, tile_px: int) -> Sample:
    """Fills the place of a sample that could not be read: no target, white tiles that nothing refers to."""
    return Sample(
        tokens_T=np.zeros(size.tokens, np.int32),
        labels_T=np.full(size.tokens, IGNORED, np.int32),
        positions_T=np.arange(size.tokens, dtype=np.int32),
        slots_T=np.full(size.tokens, -1, np.int32),
        pixels_ISSc=np.full((size.tiles, tile_px, tile_px, 3), 255, np.uint8),
        memory_positions_M=np.arange(size.tiles * tokens_per_tile, dtype=np.int32),
    )


def pack_row(samples: Sequence[Sample], config: DataConfig, tokens_per_tile: int, tile_px: int) -> Batch:
    """One row of a Batch, as numpy arrays without the axis B: `samples` one after the other, then padding.

    T = `data.pack_tokens`, I = `data.pack_tiles`, M = I * `tokens_per_tile`, S = `tile_px`. No sample: all padding.
    """
    slots = config.pack_tiles * tokens_per_tile
    tokens_T, targets_T, positions_T, segments_T = np.zeros((4, config.pack_tokens), np.int32)
    weights_T = np.zeros(config.pack_tokens, np.float32)
    slots_T = np.full(config.pack_tokens, -1, np.int32)
    pixels_ISSc = np.zeros((config.pack_tiles, tile_px, tile_px, 3), np.uint8)
    memory_positions_M, memory_segments_M = np.zeros((2, slots), np.int32)
    token, tile = 0, 0
    for segment, sample in enumerate(samples, 1):
        span = slice(token, token + len(sample.tokens_T))
        memory_span = slice(tile * tokens_per_tile, (tile + len(sample.pixels_ISSc)) * tokens_per_tile)
        tokens_T[span] = sample.tokens_T
        positions_T[span] = sample.positions_T
        segments_T[span] = segment
        slots_T[span] = np.where(sample.slots_T < 0, -1, sample.slots_T + memory_span.start)
        shifted = slice(token, span.stop - 1)  # the last token of a sample predicts nothing
        is_target_T = sample.labels_T[1:] != IGNORED
        targets_T[shifted] = np.where(is_target_T, sample.labels_T[1:], 0)
        weights_T[shifted] = is_target_T * sample_weight(config.loss_weight, int(is_target_T.sum()))
        pixels_ISSc[tile : tile + len(sample.pixels_ISSc)] = sample.pixels_ISSc
        memory_positions_M[memory_span] = sample.memory_positions_M
        memory_segments_M[memory_span] = segment
        token, tile = span.stop, tile + len(sample.pixels_ISSc)
    return Batch(
        tokens_BT=tokens_T,
        targets_BT=targets_T,
        weights_BT=weights_T,
        positions_BT=positions_T,
        segments_BT=segments_T,
        slots_BT=slots_T,
        pixels_BISSc=pixels_ISSc,
        memory_positions_BM=memory_positions_M,
        memory_segments_BM=memory_segments_M,
    )
