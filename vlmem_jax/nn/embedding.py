"""Rows of tables, such as that of the tokens."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vlmem_jax.runtime.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
    table_VD: Float[Array, "V D"], index_BT: Int32[Array, "B T"], dtype, axis: str = "vocab"
) -> Float[Array, "B T D"]:
    """Rows of a table whose axes mean `axis` and embed, cast to `dtype`. Gradients of rows are summed in fp32.

    The table crosses devices in `dtype`, which casting rows after a look-up in fp32 would not do; values are equal.
    """
    # whole rows: where they are split, the look-up would gather its result, the activations
    return constrain(constrain(table_VD.astype(dtype), axis, None)[index_BT], "batch", "tokens", None)


def _forward(table_VD, index_BT, dtype, axis):
    # an empty array carries shape and dtype of the table, which itself need not be kept
    return look_up(table_VD, index_BT, dtype, axis), (index_BT, table_VD[:, :0])


def _backward(dtype, axis, saved, d_BTD):
    index_BT, like_V0 = saved
    d_BTD = constrain(d_BTD.astype(jnp.float32), "batch", "tokens", None)
    d_VD = jnp.zeros((like_V0.shape[0], d_BTD.shape[2]), jnp.float32).at[index_BT].add(d_BTD)
    # each device sums rows over its own tokens; split over `embed` at once, the tokens' gradients would be exchanged
    return constrain(constrain(d_VD, axis, None), axis, "embed").astype(like_V0.dtype), None


look_up.defvjp(_forward, _backward)
