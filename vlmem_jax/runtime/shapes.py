"""The few shapes that programs are compiled for, whatever comes."""

from collections.abc import Sequence
from typing import NamedTuple

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


class PoolShape(NamedTuple):
    """The shapes of a pool of rows, whatever is asked of it: so all that it runs is compiled before the first answer.

    Prompts are read by chunks of `text_sizes`, and what they show by `tile_sizes`: powers of 2, of which the last is
    what there is room for.
    """

    slots: int
    """Rows that are answered side by side."""
    capacity: int
    """Tokens that each of them has room for."""
    chunk: int
    """Tokens of a prompt that are read at once, at most."""
    tiles: int = 0
    """Tiles that a prompt shows, at most."""
    forced: int = 0
    """Tokens that an answer can be made to begin with, at most."""
    smallest: int = 64
    """Tokens of the shortest chunk that there is a program for."""
    features: int = 0
    """Tiles whose visual tokens are kept, for prompts that show them again; 0: they are seen anew for each."""
    int8: bool = False
    """Whether keys and values are kept in 8 bits."""

    @classmethod
    def of(cls, slots: int, longest: int, tiles: int = 0, forced: int = 0, chunk: int = 512) -> "PoolShape":
        """A pool for rows of up to `longest` tokens, latent ones among them."""
        capacity = bucket(longest, 64)
        return cls(slots, capacity, min(chunk, capacity), bucket(tiles), bucket(forced, 16))

    @property
    def in_a_piece(self) -> "PoolShape":
        """The same, which reads all prompts by one program."""
        return self._replace(chunk=self.capacity, smallest=self.capacity)

    def fits(self, other: "PoolShape") -> bool:
        """Whether rows of another shape have room for what those of this one have."""
        return self.capacity <= other.capacity and self.tiles <= other.tiles and self.forced <= other.forced

    @property
    def text_sizes(self) -> tuple[int, ...]:
        """Sizes of the only, or the first, chunk of a prompt."""
        return powers(min(self.smallest, self.chunk), self.chunk)

    @property
    def more_sizes(self) -> tuple[int, ...]:
        """Sizes of a chunk that follows on others."""
        return tuple(sorted({min(self.smallest, self.chunk), self.chunk}))

    def tile_sizes(self, tile: TileShape) -> tuple[int, ...]:
        """Tile slots of a prompt that shows something."""
        return powers(BLOCK_BUCKET if tile.layout else 1, self.tiles) if self.tiles else ()


def powers(smallest: int, largest: int) -> tuple[int, ...]:
    """smallest * (1, 2, 4, ...), up to `largest`, which is the last whatever it is."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def least(sizes: Sequence[int], size: int) -> int:
    """The least of rising sizes that holds `size`."""
    return next(found for found in sizes if found >= size)
