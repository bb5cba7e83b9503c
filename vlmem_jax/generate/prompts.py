"""Prompts of unequal length as batches of few shapes, so that generation compiles once a bucket."""

from collections.abc import Sequence

from vlmem_jax.runtime.shapes import bucket, tile_bucket
from vlmem_jax.types import Batch, Sample, TileShape


def pad_prompts(samples: Sequence[Sample], rows: int, tile: TileShape) -> Batch:
    """A batch with a row for each prompt, padded on the right to bucketed lengths; rows beyond the prompts are empty.

    Raises ValueError if there are more prompts than rows, or a prompt's tiles do not fit the model.
    """
    if len(samples) > rows:
        raise ValueError(f"{len(samples)} prompts do not fit a batch of {rows} rows")
    T = bucket(max(len(sample.tokens_T) for sample in samples), 64)
    return filled(samples, rows, tile, T, tile_bucket(max(len(sample.pixels_ISSc) for sample in samples), tile))


def filled(samples: Sequence[Sample], rows: int, tile: TileShape, tokens: int, tiles: int) -> Batch:
    """As `pad_prompts`, with so many slots for tokens and tiles in each row."""
    batch = Batch.empty((rows,), tokens, tiles, tile)
    for row, sample in enumerate(samples):
        t, i, m = len(sample.tokens_T), len(sample.pixels_ISSc), len(sample.visual_positions_M)
        shape, wanted = sample.pixels_ISSc.shape[1:], batch.views.pixels_BISSc.shape[2:]
        if shape != wanted or m != i * tile.tokens:
            raise ValueError(
                f"the model sees tiles of {wanted} (height, width, channels) as {tile.tokens} tokens each, but the "
                f"prompt {sample.name} has {i} tiles of {shape} and {m} tokens; its processor must have the sizes "
                "of model.vision"
            )
        batch.text.tokens_BT[row, :t] = sample.tokens_T
        batch.text.positions_BT[row, :t] = sample.positions_T
        batch.text.segments_BT[row, :t] = 1
        batch.text.visual_index_BT[row, :t] = sample.visual_index_T
        batch.views.pixels_BISSc[row, :i] = sample.pixels_ISSc
        batch.views.positions_BM[row, :m] = sample.visual_positions_M
        batch.views.segments_BM[row, :m] = 1
        if tile.layout:
            batch.views.layout_BI4[row, :i] = sample.layout_I4
        if tile.pooled:
            batch.views.pool_BM[row, :m] = sample.pool_M
        if tile.geometry and i:
            batch.views.geometry.put((row, slice(i)), sample.known_geometry)
    return batch
