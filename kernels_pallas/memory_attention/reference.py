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
    precision=None,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] in q's type and lse [B, H, T] fp32 (-inf without memory), of q [B, T, H, C], k, v [B, M, K, C].

    allowed bool [B, T, M]; tables as `rotary_tables` makes them. Rows without memory are exactly zero.
    """
    (batch, num_queries, heads, width), kv_heads = q.shape, k.shape[2]
    if q_tables is not None:
        q = rotary.rotate(q, q_tables).astype(q.dtype)
    if k_tables is not None:
        k = rotary.rotate(k, k_tables).astype(k.dtype)
    grouped = q.reshape(batch, num_queries, kv_heads, heads // kv_heads, width)
    kinds = {"preferred_element_type": jnp.promote_types(q.dtype, jnp.float32), "precision": precision}
    scores = jnp.einsum("btkgc,bmkc->bkgtm", grouped, k, **kinds) * width**-0.5
    if allowed is not None:
        scores = jnp.where(allowed[:, None, None], scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    some = total > 0
    weights = weights / jnp.where(some, total, 1.0)
    o = jnp.einsum("bkgtm,bmkc->btkgc", weights.astype(v.dtype), v, **kinds).reshape(q.shape).astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(jnp.where(some, total, 1.0)), -jnp.inf)
    return o, lse[..., 0].reshape(batch, heads, num_queries)
