"""Where cameras stand and where they look, from numbers that a network gives."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def nearest_rotation(raw_N9: Float[Array, "N 9"]) -> Float[Array, "N 3 3"]:
    """The rotation nearest to each matrix, given row by row, whose rows are first brought to length 1."""
    rows_N33 = raw_N9.reshape(-1, 3, 3)
    length = jnp.linalg.norm(rows_N33, axis=-1, keepdims=True)
    u, _, v = jnp.linalg.svd(rows_N33 / jnp.maximum(length, 1e-12))
    last = jnp.linalg.det(u @ v)  # -1 where the nearest orthogonal matrix mirrors
    return (u * jnp.stack([jnp.ones_like(last), jnp.ones_like(last), last], axis=-1)[:, None]) @ v


def pose_of(rotation_N33: Float[Array, "N 3 3"], place_N3: Float[Array, "N 3"]) -> Float[Array, "N 4 4"]:
    """[rotation place; 0 1]."""
    top_N34 = jnp.concatenate([rotation_N33, place_N3[..., None]], axis=-1)
    last_N14 = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top_N34.dtype), (len(top_N34), 1, 4))
    return jnp.concatenate([top_N34, last_N14], axis=1)


def rotation_of(quaternion_N4: Float[Array, "N 4"]) -> Float[Array, "N 3 3"]:
    """The rotation of a quaternion of any length, its real part last."""
    i, j, k, r = jnp.moveaxis(quaternion_N4 / jnp.linalg.norm(quaternion_N4, axis=-1, keepdims=True), -1, 0)
    rows = (
        (1 - 2 * (j * j + k * k), 2 * (i * j - k * r), 2 * (i * k + j * r)),
        (2 * (i * j + k * r), 1 - 2 * (i * i + k * k), 2 * (j * k - i * r)),
        (2 * (i * k - j * r), 2 * (j * k + i * r), 1 - 2 * (i * i + j * j)),
    )
    return jnp.moveaxis(jnp.array(rows), -1, 0)
