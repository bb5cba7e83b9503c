"""The few shapes that programs are compiled for, whatever comes."""

from vlmem_jax.types import TileShape

BLOCK_BUCKET = 64
"""Smallest number of tiles of a tower that sees images in their own size."""


def bucket(size: int, smallest: int = 1, steps: int = 2) -> int:
    """The least of smallest * (1, 1.5, 2, 3, 4, 6, 8, ...) that holds `size`, rounded up; 0 stays 0.

    `steps` from one power of 2 to the next: with more, less is padding and more shapes are compiled.
    """
    if size == 0:
        return 0
    octave = smallest
    while octave * 2 < size:
        octave *= 2
    buckets = (-(-octave * (steps + n) // steps) for n in range(steps + 1))
    return next(found for found in buckets if found >= size)


def tile_bucket(tiles: int, tile: TileShape) -> int:
    """Tile slots of a row of `tiles`; in finer steps for a tower that sees images in their own size."""
    return bucket(tiles, BLOCK_BUCKET, steps=8) if tile.layout else bucket(tiles)
