"""Plain JAX: scores and softmax in fp32. What the kernels are tested against, and what serves where none does."""

import jax
import jax.numpy as jnp

from kernels_pallas import rotary


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_tables: rotary.Tables | None = None,
    k_tables: rotary.Tables | None = None,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] in q's type and lse [B, H, T] fp32 (-inf without memory), of q [B, T, H, C], k, v [B, M, K, C].

    allowed bool [B, T, M]; tables as `rotary_tables` makes them. Rows without memory are exactly zero.
    """
    (batch, num_queries, heads, width), kv_heads = q.shape, k.shape[2]
    group, wide = heads // kv_heads, jnp.promote_types(q.dtype, jnp.float32)
    q = (q if q_tables is None else rotary.rotate(q, q_tables)).astype(wide) * width**-0.5
    k = k if k_tables is None else rotary.rotate(k, k_tables).astype(k.dtype)
    # the query heads of a group become neighbouring queries: 4-axis contractions run twice as fast on CPU
    rows = q.astype(k.dtype).reshape(batch, num_queries, kv_heads, group, width).swapaxes(2, 3)
    rows = rows.reshape(batch, num_queries * group, kv_heads, width)
    scores = jnp.einsum("bqkc,bmkc->bkqm", rows, k, preferred_element_type=wide)
    if allowed is not None:
        scores = jnp.where(jnp.repeat(allowed, group, axis=1)[:, None], scores, -jnp.inf)
    weights, lse = _softmax(scores)
    o = jnp.einsum("bkqm,bmkc->bqkc", weights.astype(v.dtype), v)
    o = o.reshape(batch, num_queries, group, kv_heads, width).swapaxes(2, 3).reshape(q.shape)
    lse = lse.reshape(batch, kv_heads, num_queries, group).swapaxes(2, 3)
    return o, lse.reshape(batch, heads, num_queries)


@jax.custom_vjp
def _softmax(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Over the last axis, and its log-sum-exp. The backward pass reads the weights alone, not the scores."""
    top = scores.max(axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    return weights, (top + jnp.log(total))[..., 0]


def _softmax_forward(scores):
    weights, lse = _softmax(scores)
    return (weights, lse), weights


def _softmax_backward(weights, gradients):
    by_weights, by_lse = gradients
    centre = (weights * by_weights).sum(axis=-1, keepdims=True) - by_lse[..., None]
    return (weights * (by_weights - centre),)


_softmax.defvjp(_softmax_forward, _softmax_backward)
