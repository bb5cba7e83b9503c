"""What crosses from the API to a backend, and which blocks of a row meet."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import rotary
from kernels_pallas.lanes import LOG2_E

Positions = jax.Array | rotary.Tables | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static side of one call."""

    theta: float = 1e6
    chip: str = "v5e"
    """TPU whose block sizes to use."""
    interpret: bool = False


class Inputs(NamedTuple):
    """Arrays of one call. q [B, T, H, C], k, v [B, T, K, C]; positions [B, T] or tables of them; segments [B, T], 0 or
    less meets nothing; prefix [B, T]: the segment that a token sees beside its own, 0: none."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    positions: Positions = None
    segments: jax.Array | None = None
    prefix: jax.Array | None = None

    def allowed(self) -> jax.Array:
        """bool [B, T, T], for plain JAX: the token itself and earlier ones of its segment and its prefix."""
        length = self.q.shape[1]
        earlier = jnp.tril(jnp.ones((length, length), bool))[None]
        if self.segments is None:
            return earlier
        keys = self.segments[:, None]
        same = self.segments[:, :, None] == keys
        if self.prefix is not None:
            same = same | ((self.prefix[:, :, None] == keys) & (self.segments[:, :, None] > 0))
        return earlier & same & (keys > 0)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one compiled kernel does; C is 128 by now, T whole blocks."""

    head_dim: int
    """Before padding; sets the scale."""
    turned: bool
    chip: str = "v5e"
    interpret: bool = False

    @property
    def scale(self) -> float:
        """Scores come out in powers of two."""
        return self.head_dim**-0.5 * LOG2_E


class Meeting(NamedTuple):
    """Which blocks of keys each block of rows meets, besides those on the diagonal."""

    tiles: jax.Array
    """int32 [B, N * M]: for each of the N blocks of rows, the M blocks of keys, those in reach first."""
    counts: jax.Array
    """int32 [B, N]: how many are in reach; -1 where the rows are padding alone."""


def meeting(segments: jax.Array, prefix: jax.Array | None, rows: int, keys: int) -> Meeting:
    """Of segments and prefixes [B, T], T a multiple of `rows`, that of `keys`; no block is left out wrongly."""
    length = segments.shape[1]

    def bounds(x, size):
        """Least and largest id of each block; padding has none."""
        x = x.reshape(x.shape[0], -1, size)
        return jnp.where(x > 0, x, jnp.iinfo(x.dtype).max).min(axis=-1), x.max(axis=-1)

    key_low, key_high = (x[:, None] for x in bounds(segments, keys))
    met = jnp.zeros((), bool)
    for ids in (segments, prefix):
        if ids is not None:
            low, high = (x[:, :, None] for x in bounds(ids, rows))
            met = met | ((high >= key_low) & (low <= key_high) & (high > 0))
    met = met & (jnp.arange(0, length, keys) < jnp.arange(0, length, rows)[:, None])
    tiles = jnp.argsort(jnp.logical_not(met), axis=-1, stable=True).astype(jnp.int32)
    padding = (segments <= 0).reshape(len(segments), -1, rows).all(axis=-1)
    counts = jnp.where(padding, -1, met.sum(axis=-1)).astype(jnp.int32)
    return Meeting(tiles.reshape(len(tiles), -1), counts)
