"""Samples to a packed row: arrays of fixed shape, targets and loss weights shifted on the host."""

from collections.abc import Sequence

import numpy as np

from vlmem_jax.data.config import DataConfig
from vlmem_jax.data.samples import Size
from vlmem_jax.processing.processor import blank_tiles
from vlmem_jax.types import IGNORED, Batch, Sample, TileShape


def sample_weight(kind: str, targets: int) -> np.float32:
    """Loss weight of each of the `targets` target tokens of a sample, by `data.loss_weight` (CoMemo sec. 4)."""
    return np.float32({"token": 1.0, "sample": 1 / max(targets, 1), "square": max(targets, 1) ** -0.5}[kind])


def blank_sample(size: Size, tile: TileShape) -> Sample:
    """Fills the place of a sample that could not be read: no target, white tiles that nothing refers to."""
    positions_T = np.arange(size.tokens, dtype=np.int32)
    return Sample(
        tokens_T=np.zeros(size.tokens, np.int32),
        labels_T=np.full(size.tokens, IGNORED, np.int32),
        positions_T=positions_T if tile.axes == 1 else np.stack([positions_T] * tile.axes, axis=1),
        visual_index_T=np.full(size.tokens, -1, np.int32),
        **blank_tiles(size.tiles, tile),
    )


def pack_row(
    samples: Sequence[Sample], config: DataConfig, tile: TileShape, tokens: int | None = None, tiles: int | None = None
) -> Batch:
    """One row of a Batch, as numpy arrays without the axis B: `samples` one after the other, then padding.

    T = `tokens`, by default `data.pack_tokens`; I = `tiles`, by default `data.pack_tiles`. No sample: all padding.
    """
    T, I = (config.pack_tokens if tokens is None else tokens), (config.pack_tiles if tiles is None else tiles)
    row = Batch.empty((), T, I, tile)
    token, first = 0, 0
    for segment, sample in enumerate(samples, 1):
        span = slice(token, token + len(sample.tokens_T))
        shown = slice(first, first + len(sample.pixels_ISSc))
        memory = slice(shown.start * tile.tokens, shown.stop * tile.tokens)
        row.text.tokens_BT[span] = sample.tokens_T
        row.text.positions_BT[span] = sample.positions_T
        row.text.segments_BT[span] = segment
        row.text.visual_index_BT[span] = np.where(sample.visual_index_T < 0, -1, sample.visual_index_T + memory.start)
        shifted = slice(token, span.stop - 1)  # the last token of a sample predicts nothing
        is_target_T = sample.labels_T[1:] != IGNORED
        row.text.targets_BT[shifted] = np.where(is_target_T, sample.labels_T[1:], 0)
        row.text.weights_BT[shifted] = is_target_T * sample_weight(config.loss_weight, int(is_target_T.sum()))
        row.views.pixels_BISSc[shown] = sample.pixels_ISSc
        row.views.positions_BM[memory] = sample.visual_positions_M
        row.views.segments_BM[memory] = segment
        if tile.layout:
            row.views.layout_BI4[shown] = sample.layout_I4 + [shown.start, shown.start, 0, 0]
        if tile.pooled:
            row.views.pool_BM[memory] = sample.pool_M + memory.start
        if tile.geometry and len(sample.pixels_ISSc):
            row.views.geometry.put(shown, sample.known_geometry)
        token, first = span.stop, shown.stop
    return row
