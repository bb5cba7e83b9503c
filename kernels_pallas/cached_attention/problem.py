"""What crosses from the API to a backend, and which blocks meet."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import rotary

Positions = jax.Array | rotary.Tables | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static side of one call."""

    theta: float = 1e6
    chip: str = "v5e"
    """TPU whose block sizes to use."""
    interpret: bool = False


class Inputs(NamedTuple):
    """Arrays of one call. q [B, T, H, C]; k, v [L, B, K, S, C], turned already; layer int32 []; start, count int32 [B];
    positions [B, T] or tables of them, of q alone."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    layer: jax.Array
    start: jax.Array
    count: jax.Array
    positions: Positions = None

    def allowed(self) -> jax.Array:
        """bool [B, T, S], for plain JAX: slots up to a token's own; none where there is no token."""
        token, slot = jnp.arange(self.q.shape[1]), jnp.arange(self.k.shape[3])
        own = self.start[:, None] + token
        return (slot <= own[:, :, None]) & (token < self.count[:, None])[:, :, None]


def last_block(start, count, first, rows: int, keys: int):
    """The last block of so many keys that a block of queries meets, those of a row's tokens `first` and on; of queries
    without tokens, 0. Of arrays, or of scalars inside a kernel."""
    return jnp.maximum(start + jnp.minimum(count, first + rows) - 1, 0) // keys
