"""Attention cores: what every head does between its projections. Softmax in fp32."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

MASKED = -1e30
"""Additive score of a forbidden key: finite, so that a row without any allowed key stays free of NaN."""


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    allowed_BTS: Bool[Array, "B T S"] | None,
) -> Float[Array, "B T H C"]:
    """softmax(q k^T / sqrt(C)) v over the allowed keys; each key/value head serves H/K neighbouring query heads.

    A query that may attend to nothing gets the mean of v: the caller discards it.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=jnp.float32) / math.sqrt(C)
    if allowed_BTS is not None:
        scores += jnp.where(allowed_BTS, 0.0, MASKED)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKC.dtype)
    return jnp.einsum("BKGTS,BSKC->BTKGC", weights, v_BSKC).reshape(B, T, H, C)


def same_segment(segments_BT: Int32[Array, "B T"], segments_BS: Int32[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Pairs that belong to one sample; segment 0 is padding and matches nothing."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def causal_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Self-attention to earlier tokens of the same sample; order is by index, since rotary positions may repeat."""
    T = q_BTHC.shape[1]
    earlier_TT = jnp.tril(jnp.ones((T, T), bool))
    return attend(q_BTHC, k_BTKC, v_BTKC, same_segment(segments_BT, segments_BT) & earlier_TT)
