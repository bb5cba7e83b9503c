"""Thumbnail-aggregated positions of image tokens (RoPE-DHR, CoMemo 2506.06279 sec. 3.3)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


def raster_positions(grid: jax.Array, tiles: int, side: int = 16, base: jax.Array | int = 0) -> jax.Array:
    """int32 [B, tiles * side^2]: each tile token's id in the thumbnail, tiles row by row, thumbnail last.

    grid [B, 2] holds columns and rows; tiles is the most an image has, thumbnail included. Ids are
    base + row * side + column of the thumbnail's token there. Tiles beyond an image's own repeat its thumbnail; leave
    them out by `num_valid`. By the tiles' places.
    """
    columns, rows = (jnp.maximum(grid[:, i], 1)[:, None, None] for i in (0, 1))
    tile = jnp.arange(tiles)[None, :, None]
    token = jnp.arange(side * side)[None, None]
    row, column = token // side, token % side
    thumbnail = row * side + column
    spread = ((tile // columns) * side + row) // rows * side + ((tile % columns) * side + column) // columns
    ids = jnp.where((tile < columns * rows) & (columns * rows > 1), spread, thumbnail)
    return (ids.reshape(grid.shape[0], -1) + jnp.asarray(base).reshape(-1, 1)).astype(jnp.int32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["grid", "base"], meta_fields=["side"])
@dataclasses.dataclass(frozen=True)
class TileGrid:
    """Positions of a memory that is one tiled image a row, see `raster_positions`; stands in for `k_pos`."""

    grid: jax.Array
    """int [B, 2]: columns and rows of tiles."""
    base: jax.Array | int = 0
    """int or [B]: position of the image's first thumbnail token."""
    side: int = 16
    """Tokens along a side of a tile."""

    def positions(self, batch: int, num_slots: int) -> jax.Array:
        """int32 [B, num_slots]. Raises ValueError where these are not whole tiles of such a grid."""
        if self.grid.shape != (batch, 2) or not jnp.issubdtype(self.grid.dtype, jnp.integer):
            raise ValueError(f"k_pos.grid must be integers ({batch}, 2), got {self.grid.dtype} {self.grid.shape}")
        tiles, rest = divmod(num_slots, self.side**2)
        if rest:
            raise ValueError(f"k must have whole tiles of {self.side}^2 slots for a TileGrid, got {num_slots}")
        return raster_positions(self.grid, tiles, self.side, self.base)
