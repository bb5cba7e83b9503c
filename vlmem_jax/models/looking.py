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
    kept_first: bool = False,
    key: Array | None = None,
) -> Float[Array, "B I N D"]:
    """What is seen of the frames of packed rows; a sample's first frame finds an empty memory, padding is left alone.

    `kept_first`: those that the memory keeps at the end of their sample stand first in it, oldest first, as many as it
    has room for. With a key, as in training, how many that are may be drawn, where all frames are shown.

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
        return state, (seen_BND, memory.readout(state)[1] if kept_first else None)

    @jax.checkpoint
    def stretch(state: State, frames: tuple) -> tuple[State, tuple]:
        return jax.lax.scan(step, state, frames)

    def unstacked(x: Array) -> Array:
        return jnp.moveaxis(x, 2, 0).reshape(B, stretches * length, *x.shape[3:])[:, :I]

    begun = memory.begin(B, frames_BIND.dtype, None if kept_first else key)
    _, made = jax.lax.scan(stretch, begun, jax.tree.map(stacked, steps))
    seen_BIND, kept_BIL = jax.tree.map(unstacked, made)
    if not kept_first:
        return seen_BIND
    return jnp.take_along_axis(seen_BIND, kept_order(kept_BIL, segments_BI)[..., None, None], axis=1)


def kept_order(kept_BIL: Int32[Array, "B I L"], segments_BI: Int32[Array, "B I"]) -> Int32[Array, "B I"]:
    """Frames in the order in which those that are kept come first in their sample.

    `kept`: after each frame, the numbers of those of its sample that are kept then, from 0.
    """
    _, I = segments_BI.shape
    number_I = jnp.arange(I)
    same_BII = segments_BI[:, :, None] == segments_BI[:, None]
    first_BI = jnp.where(same_BII, number_I, I).min(-1)
    last_BI = jnp.where(same_BII, number_I, -1).max(-1)
    kept_BIL = jnp.take_along_axis(kept_BIL, last_BI[..., None], axis=1)
    is_kept_BI = (kept_BIL == (number_I - first_BI)[..., None]).any(-1)
    return jnp.argsort(2 * first_BI + ~is_kept_BI, axis=-1, stable=True).astype(jnp.int32)
