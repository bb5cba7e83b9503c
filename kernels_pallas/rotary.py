"""Rotary angles inside and outside kernels, half-split: the pair of lane i is lane i + C/2. Angles are fp32."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

_TURN = 2 * math.pi
# 2 pi in three parts; n times each of the first two is exact for the n that positions up to 2^20 give.
_TURN_HIGH = float(np.float32(6.28125))
_TURN_MIDDLE = float(np.float32(np.round((_TURN - 6.28125) * 2**20) / 2**20))
_TURN_LOW = float(np.float32(_TURN - _TURN_HIGH - _TURN_MIDDLE))


def _sine_coefficients(degree: int = 11) -> list[float]:
    """Odd polynomial that is nearest to the sine on [-pi, pi], at Chebyshev points of its square."""
    nodes = (np.cos(np.pi * (np.arange(200) + 0.5) / 200) + 1) / 2 * (np.pi + 1e-3) ** 2
    x = np.sqrt(nodes)
    powers = np.stack([x ** (2 * n + 1) for n in range((degree + 1) // 2)], axis=1)
    return [float(c) for c in np.linalg.lstsq(powers, np.sin(x), rcond=None)[0]]


_SINE = _sine_coefficients()


class Tables(NamedTuple):
    """cos [.., C] as [c|c] and sin as [-s|s], fp32: x turned is x * cos + roll(x, C/2) * sin."""

    cos: jax.Array
    sin: jax.Array


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """fp32 [C/2]: angle per unit of position of each pair."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)


def rotary_tables(positions: jax.Array, theta: float, head_dim: int) -> Tables:
    """Tables [B, T, C] of integer positions [B, T]; make them once and share them over layers and heads."""
    return tables_of_angles(positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta))


def tables_of_angles(angles: jax.Array) -> Tables:
    """Tables [.., C] of fp32 angles [.., C/2] (for M-RoPE: whichever axis each pair turns by)."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return Tables(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


def rotate(x: jax.Array, tables: Tables, *, inverse: bool = False) -> jax.Array:
    """fp32 [.., T, H, C] turned by tables [.., T, C] (plain JAX)."""
    cos, sin = tables.cos[..., None, :], tables.sin[..., None, :]
    x = x.astype(jnp.float32)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * (-sin if inverse else sin)


def turned(x: jax.Array, cos: jax.Array, sin: jax.Array, *, inverse: bool = False) -> jax.Array:
    """rotate of rows [N, C] inside a TPU kernel."""
    x = x.astype(jnp.float32)
    swapped = pltpu.roll(x, x.shape[1] // 2, 1) * sin
    return x * cos - swapped if inverse else x * cos + swapped


def angle_row(head_dim: int, width: int, theta: float) -> np.ndarray:
    """fp32 [1, width]: the angle per position of each lane, both halves alike; padded lanes stand still."""
    half = np.zeros(width // 2, np.float32)
    half[: head_dim // 2] = frequencies(head_dim, theta)
    return np.concatenate([half, half])[None]


def tables_in_kernel(positions: jax.Array, angle_row: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin tables [N, C] of positions that fill the lanes [N, C] (int32), inside a TPU kernel.

    One polynomial gives both: lanes of the first half take the sine a quarter turn ahead. Within 1e-6 of the exact
    sine of the fp32 angle for angles up to 32768.
    """
    width = positions.shape[1]
    first = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) < width // 2
    angle = positions.astype(jnp.float32) * angle_row
    turns = jnp.round(angle * (1 / _TURN) + jnp.where(first, 0.25, 0.0))
    rest = ((angle - turns * _TURN_HIGH) - turns * _TURN_MIDDLE) - turns * _TURN_LOW
    rest = rest + jnp.where(first, math.pi / 2, 0.0)
    square = rest * rest
    value = jnp.full_like(square, _SINE[-1])
    for c in _SINE[-2::-1]:
        value = value * square + c
    value = value * rest  # cos | sin
    swapped = pltpu.roll(value, width // 2, 1)
    return jnp.where(first, value, swapped), jnp.where(first, -swapped, value)


def packed(tables: Tables) -> jax.Array:
    """[.., C] of tables [.., C]: cos of each pair, then its sine; half the bytes."""
    half = tables.cos.shape[-1] // 2
    return jnp.concatenate([tables.cos[..., :half], tables.sin[..., half:]], axis=-1)


def unpacked(table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos, sin tables [N, C] of a packed one, inside a TPU kernel."""
    width = table.shape[1]
    first = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) < width // 2
    swapped = pltpu.roll(table, width // 2, 1)
    return jnp.where(first, table, swapped), jnp.where(first, -swapped, table)
