"""Rows of the token table."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vlmem_jax.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD: Float[Array, "V D"], tokens_BT: Int32[Array, "B T"], dtype) -> Float[Array, "B T D"]:
    """Rows of a table, cast to `dtype`. The gradient of a row, a sum over all tokens that are it, is summed in fp32.

    The table crosses devices in `dtype`, which casting rows after a look-up in fp32 would not do; values are equal.
    """
    # whole rows: where they are split, the look-up would gather its result, the activations
    return constrain(table_VD.astype(dtype), "vocab", None)[tokens_BT]


def _forward(table_VD, tokens_BT, dtype):
    # an empty array carries shape and dtype of the table, which itself need not be kept
    return look_up(table_VD, tokens_BT, dtype), (tokens_BT, table_VD[:, :0])


def _backward(dtype, saved, d_BTD):
    tokens_BT, like_V0 = saved
    d_BTD = constrain(d_BTD.astype(jnp.float32), "batch", "tokens", None)
    d_VD = jnp.zeros((like_V0.shape[0], d_BTD.shape[2]), jnp.float32).at[tokens_BT].add(d_BTD)
    # each device sums rows over its own tokens; split over `embed` at once, the tokens' gradients would be exchanged
    d_VD = constrain(d_VD, "vocab", None)
    return constrain(d_VD, "vocab", "embed").astype(like_V0.dtype), None


look_up.defvjp(_forward, _backward)
