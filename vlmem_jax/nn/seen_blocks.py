"""Causal attention of packed rows by XLA that computes blocks of pairs only where some pair is seen.

Rows are cut into blocks of BLOCK tokens; a loop goes over the blocks of queries and keys that meet, and joins what each
query got so far by log-sum-exp (arXiv 2205.14135). So answers that share a prompt do not pay for each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

BLOCK = 128


class Meeting(NamedTuple):
    """Which blocks of N = B * n have a pair that may be seen."""

    queries: Int32[Array, "pairs"]
    """Numbers of the blocks of queries; those that meet come first."""
    keys: Int32[Array, "pairs"]
    """Those of the keys that they meet."""
    count: Int32[Array, ""]
    """How many pairs of blocks meet."""


def seen_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
    prefix_BT: Int32[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """As `attention.causal_attention` without tables; what padding gets is zero. No T x T scores exist, in the backward
    pass either, which makes those of each block again."""
    (B, T, H, C), K = q_BTHC.shape, k_BTKC.shape[2]
    G, n = H // K, -(-T // BLOCK)
    # the queries of a group of heads become neighbouring rows, as those that meet the same keys
    q_NPKGC = _in_blocks(q_BTHC.reshape(B, T, K, G, C) * C**-0.5).reshape(B * n, BLOCK, K, G, C)
    q_NKRC = q_NPKGC.transpose(0, 2, 1, 3, 4).reshape(B * n, K, BLOCK * G, C).astype(k_BTKC.dtype)
    k_NKPC, v_NKPC = (_in_blocks(x).reshape(B * n, BLOCK, K, C).swapaxes(1, 2) for x in (k_BTKC, v_BTKC))
    out_NKRC = _attend(q_NKRC, k_NKPC, v_NKPC, segments_BT, prefix_BT)
    out_BTHC = out_NKRC.reshape(B * n, K, BLOCK, G, C).transpose(0, 2, 1, 3, 4).reshape(B, n * BLOCK, H, C)
    return out_BTHC[:, :T].astype(q_BTHC.dtype)


def meeting(segments_BT: Int32[Array, "B T"], prefix_BT: Int32[Array, "B T"]) -> Meeting:
    """Of rows with such segments, whose blocks are numbered one row after the other."""
    most, segments_BnP = jnp.iinfo(jnp.int32).max, _in_blocks(segments_BT)
    n = segments_BnP.shape[1]

    def ends(ids_BnP: Array) -> tuple[Array, Array]:
        return jnp.where(ids_BnP > 0, ids_BnP, most).min(-1), ids_BnP.max(-1)

    low, high = ends(segments_BnP)

    def within(first: Array, last: Array) -> Array:
        return (first[:, :, None] <= high[:, None]) & (low[:, None] <= last[:, :, None])

    before = jnp.arange(n) <= jnp.arange(n)[:, None]
    meets_Bnn = (within(low, high) | within(*ends(_in_blocks(prefix_BT)))) & before
    row, query, key = jnp.nonzero(meets_Bnn, size=meets_Bnn.size, fill_value=0)
    return Meeting(row * n + query, row * n + key, meets_Bnn.sum())


def _in_blocks(x_BT: Array) -> Array:
    """[B, T, ...] as [B, n, BLOCK, ...], with padding behind."""
    B, T, *rest = x_BT.shape
    x = jnp.pad(x_BT, ((0, 0), (0, -T % BLOCK)) + ((0, 0),) * len(rest))
    return x.reshape(B, -1, BLOCK, *rest)


def _scores(q_NKRC: Array, k_NKPC: Array, segments_NP: Array, prefix_NP: Array, i: Array, j: Array) -> Array:
    """Of the queries of block i and the keys of block j [K, R, P], fp32; -inf where a pair is not seen."""
    own_Q1, shared_Q1, keys_P = segments_NP[i][:, None], prefix_NP[i][:, None], segments_NP[j]
    order_Q, order_P = jnp.arange(BLOCK)[:, None] + (i - j) * BLOCK, jnp.arange(BLOCK)
    # padding names no prefix, and a prefix of 0 meets nothing
    seen_QP = ((own_Q1 == keys_P) | ((shared_Q1 == keys_P) & (own_Q1 > 0))) & (keys_P > 0) & (order_P <= order_Q)
    scores_KRP = jnp.einsum("krc,kpc->krp", q_NKRC[i], k_NKPC[j], preferred_element_type=jnp.float32)
    return jnp.where(jnp.repeat(seen_QP, q_NKRC.shape[2] // BLOCK, axis=0), scores_KRP, -jnp.inf)


def _forward(q_NKRC, k_NKPC, v_NKPC, segments_BT, prefix_BT):
    queries, keys, count = meeting(segments_BT, prefix_BT)
    segments_NP, prefix_NP = (_in_blocks(x).reshape(-1, BLOCK) for x in (segments_BT, prefix_BT))

    def meet(pair, so_far):
        out_NKRC, lse_NKR = so_far
        i, j = queries[pair], keys[pair]
        scores_KRP = _scores(q_NKRC, k_NKPC, segments_NP, prefix_NP, i, j)
        lse_KR = jnp.logaddexp(lse_NKR[i], jax.nn.logsumexp(scores_KRP, axis=-1))
        top_KR = jnp.where(jnp.isfinite(lse_KR), lse_KR, 0.0)
        weights_KRP = jnp.exp(scores_KRP - top_KR[..., None])
        new_KRC = jnp.einsum(
            "krp,kpc->krc", weights_KRP.astype(v_NKPC.dtype), v_NKPC[j], preferred_element_type=jnp.float32
        )
        out_KRC = out_NKRC[i] * jnp.exp(lse_NKR[i] - top_KR)[..., None] + new_KRC
        return out_NKRC.at[i].set(out_KRC), lse_NKR.at[i].set(lse_KR)

    nothing = jnp.zeros(q_NKRC.shape, jnp.float32), jnp.full(q_NKRC.shape[:3], -jnp.inf)
    out_NKRC, lse_NKR = jax.lax.fori_loop(0, count, meet, nothing)
    return out_NKRC, (q_NKRC, k_NKPC, v_NKPC, segments_BT, prefix_BT, out_NKRC, lse_NKR)


def _backward(saved, d_out_NKRC):
    q_NKRC, k_NKPC, v_NKPC, segments_BT, prefix_BT, out_NKRC, lse_NKR = saved
    queries, keys, count = meeting(segments_BT, prefix_BT)
    segments_NP, prefix_NP = (_in_blocks(x).reshape(-1, BLOCK) for x in (segments_BT, prefix_BT))
    top_NKR = jnp.where(jnp.isfinite(lse_NKR), lse_NKR, 0.0)
    centre_NKR = (out_NKRC * d_out_NKRC).sum(-1)

    def product(how, one, other):
        return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)

    def meet(pair, so_far):
        d_q_NKRC, d_k_NKPC, d_v_NKPC = so_far
        i, j = queries[pair], keys[pair]
        scores_KRP = _scores(q_NKRC, k_NKPC, segments_NP, prefix_NP, i, j)
        weights_KRP = jnp.exp(scores_KRP - top_NKR[i][..., None])
        d_out_KRC = d_out_NKRC[i].astype(v_NKPC.dtype)
        d_weights_KRP = product("krc,kpc->krp", d_out_KRC, v_NKPC[j])
        d_scores_KRP = (weights_KRP * (d_weights_KRP - centre_NKR[i][..., None])).astype(q_NKRC.dtype)
        return (
            d_q_NKRC.at[i].add(product("krp,kpc->krc", d_scores_KRP, k_NKPC[j])),
            d_k_NKPC.at[j].add(product("krp,krc->kpc", d_scores_KRP, q_NKRC[i])),
            d_v_NKPC.at[j].add(product("krp,krc->kpc", weights_KRP.astype(v_NKPC.dtype), d_out_KRC)),
        )

    arrays = q_NKRC, k_NKPC, v_NKPC
    found = jax.lax.fori_loop(0, count, meet, tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays))
    return *(d.astype(x.dtype) for d, x in zip(found, arrays, strict=True)), None, None


_attend = jax.custom_vjp(lambda *arguments: _forward(*arguments)[0])
_attend.defvjp(_forward, _backward)
