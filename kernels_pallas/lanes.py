"""What the TPU kernels share: heads of 128 lanes, powers of two instead of e, matmuls that add up in fp32."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

LANES = 128
LOG2_E = math.log2(math.e)
NEVER = -1e30
"""Score of a pair that does not meet."""
VMEM_LIMIT = {"v5e": 110 * 2**20, "v5p": 88 * 2**20, "v6e": 110 * 2**20}
"""Bytes that a kernel may ask for."""


def up(count: int, unit: int) -> int:
    """count, rounded up to a multiple of unit."""
    return -(-count // unit) * unit


def column(row: jax.Array) -> jax.Array:
    """[1, N] along the lanes to [N, 128], alike in each lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def along_lanes(x: jax.Array) -> jax.Array:
    """[N, 128], alike in each lane, to [1, N]; the units for arithmetic do it faster than that for transposes."""
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    parts = (jnp.where(row == lane, x[i : i + LANES], 0.0) for i in range(0, x.shape[0], LANES))
    return jnp.concatenate([jnp.sum(part, axis=0, keepdims=True) for part in parts], axis=1)


def precision(dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dots(dtype) -> Callable:
    """Matmuls of operands of this type that give fp32."""
    return functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32, precision=precision(dtype))


def lane_sums(p: jax.Array) -> jax.Array:
    """[N, M] to [N, 128], whose sum over lanes is that of p."""
    return functools.reduce(jnp.add, [p[:, i : i + LANES] for i in range(0, p.shape[1], LANES)])


def halves(x: jax.Array) -> jax.Array:
    """Lanes to 128, each half padded by itself so that pairs stay 64 lanes apart."""
    width = x.shape[-1]
    if width == LANES:
        return x
    x = x.reshape(*x.shape[:-1], 2, width // 2)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, (LANES - width) // 2)])
    return x.reshape(*x.shape[:-2], LANES)


def pad_heads(x: jax.Array, rows: int) -> jax.Array:
    """[B, N, H, C] to [B, rows, H*128]."""
    x = halves(x)
    return jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), (0, rows - x.shape[1]), (0, 0)))


def unpad_heads(x: jax.Array, rows: int, width: int) -> jax.Array:
    """[B, rows, H*128] to [B, N, H, C]."""
    if width == LANES:
        return x[:, :rows].reshape(x.shape[0], rows, -1, width)
    x = x[:, :rows].reshape(x.shape[0], rows, -1, 2, LANES // 2)[..., : width // 2]
    return x.reshape(*x.shape[:-2], width)


def pad_row(x: jax.Array, count: int, fill: int) -> jax.Array:
    """[B, N] to int32 [B, 1, count]."""
    return jnp.pad(x.astype(jnp.int32), ((0, 0), (0, count - x.shape[1])), constant_values=fill)[:, None]
