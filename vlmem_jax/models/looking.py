"""Frames that are seen one after the other, through the door SEE: all of a row in a scan, or one at a time."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vlmem_jax.memory import Frame, See
from vlmem_jax.trees import State
from vlmem_jax.types import Geometry


def in_turn(
    memory: See,
    frames_BIND: Float[Array, "B I N D"],
    segments_BI: Int32[Array, "B I"],
    geometry: Geometry | None = None,
) -> Float[Array, "B I N D"]:
    """What is seen of the frames of packed rows; a sample's first frame finds an empty memory, padding is left alone.

    States between stretches of about sqrt(I) frames are stored for the backward pass, those within are made again.
    """
    B, I = segments_BI.shape
    before_BI = jnp.pad(segments_BI, ((0, 0), (1, 0)))[:, :-1]
    steps = frames_BIND, geometry, segments_BI > 0, segments_BI != before_BI
    length = math.isqrt(max(I - 1, 0)) + 1
    stretches = -(-I // length)

    def stacked(x_BI: Array) -> Array:
        x_BI = jnp.pad(x_BI, ((0, 0), (0, stretches * length - I), *((0, 0),) * (x_BI.ndim - 2)))
        return jnp.moveaxis(x_BI.reshape(B, stretches, length, *x_BI.shape[2:]), 0, 2)

    def step(state: State, frame: tuple) -> tuple[State, Array]:
        x_BND, geometry, valid_B, fresh_B = frame
        seen_BND, state = memory.take(state, Frame(x_BND, geometry), valid_B, fresh_B)
        return state, seen_BND

    @jax.checkpoint
    def stretch(state: State, frames: tuple) -> tuple[State, Array]:
        return jax.lax.scan(step, state, frames)

    begun = memory.begin(B, frames_BIND.dtype)
    _, seen = jax.lax.scan(stretch, begun, jax.tree.map(stacked, steps))
    return jnp.moveaxis(seen, 2, 0).reshape(B, stretches * length, *frames_BIND.shape[2:])[:, :I]
