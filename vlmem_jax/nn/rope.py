"""Rotary positions, half-split: the pair of element i is element i + C/2. Angles are fp32 throughout."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

Rotation = tuple[Float32[Array, "B T R"], Float32[Array, "B T R"]]
"""cos and sin of every position's angles."""


def frequencies(head_dim: int, theta: Float32[Array, "*B"] | float) -> Float32[Array, "*B R"]:
    """Angle per unit of position of each pair: theta^(-2i/C)."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / jnp.asarray(theta, jnp.float32)[..., None] ** exponents


def dynamic_theta(
    length: Int32[Array, "*B"], theta: float, factor: float, max_positions: int, head_dim: int
) -> Float32[Array, "*B"]:
    """Base of the rotation of samples of `length` tokens: raised beyond `max_positions` (dynamic NTK scaling)."""
    stretch = factor * length.astype(jnp.float32) / max_positions - (factor - 1)
    return theta * jnp.maximum(stretch, 1.0) ** (head_dim / (head_dim - 2))


def angles(
    positions: Int32[Array, "B T"] | Int32[Array, "B T A"],
    frequencies: Float32[Array, "*#BT R"],
    axes: tuple[int, ...] = (),
) -> Float32[Array, "B T R"]:
    """Angle of every pair; frequencies may differ from row to row, [B, 1, R], or from token to token, [B, T, R].

    Of positions on several axes pair r turns by the one on `axes[r]`.
    """
    if positions.ndim == 3:
        of_pair = [np.array(axes) == axis for axis in range(positions.shape[-1])]
        turned = jnp.select(of_pair, [positions[..., axis, None] for axis in range(positions.shape[-1])])
        return turned.astype(jnp.float32) * frequencies
    return positions[..., None].astype(jnp.float32) * frequencies


def rotation(
    positions: Int32[Array, "B T"] | Int32[Array, "B T A"],
    frequencies: Float32[Array, "*#BT R"],
    axes: tuple[int, ...] = (),
) -> Rotation:
    """Tables for `rotate`, made once and shared by all layers; see `angles`."""
    turned = angles(positions, frequencies, axes)
    return jnp.cos(turned), jnp.sin(turned)


def rotate(x_BTHC: Float[Array, "B T H C"], tables: Rotation) -> Float[Array, "B T H C"]:
    """x turned by its position's angles, computed in fp32."""
    cos, sin = (table[:, :, None] for table in tables)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)
