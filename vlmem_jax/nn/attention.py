"""Attention cores: what every head does between its projections. Softmax in fp32."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as gpu_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.sharding import platform, spec

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
    # the query heads of a group become neighbouring queries: 4-axis contractions run twice as fast on CPU
    grouped = (q_BTHC / math.sqrt(C)).reshape(B, T, K, H // K, C).swapaxes(2, 3).reshape(B, T * H // K, K, C)
    scores = jnp.einsum("BQKC,BSKC->BKQS", grouped, k_BSKC, preferred_element_type=jnp.float32)
    if allowed_BTS is not None:
        allowed_BQS = jnp.repeat(allowed_BTS, H // K, axis=1)
        scores += jnp.where(allowed_BQS, 0.0, MASKED)[:, None]
    out = jnp.einsum("BKQS,BSKC->BQKC", _softmax(scores).astype(v_BSKC.dtype), v_BSKC)
    return out.reshape(B, T, H // K, K, C).swapaxes(2, 3).reshape(B, T, H, C)


@jax.custom_vjp
def _softmax(scores: Float[Array, "..."]) -> Float[Array, "..."]:
    """Over the last axis. Its backward pass reads the result alone, which saves a pass over the scores."""
    unnormalised = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def _softmax_forward(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = _softmax(scores)
    return weights, weights


def _softmax_backward(weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (weights * (gradient - (weights * gradient).sum(axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def same_segment(segments_BT: Int32[Array, "B T"], segments_BS: Int32[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Pairs that belong to one sample; segment 0 is padding and matches nothing."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def causal_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Self-attention to earlier tokens of the same sample; order is by index, since rotary positions may repeat.

    On a TPU and a GPU, JAX's own kernels do it where the shapes allow (T a multiple of 128, C of 128 or 64): the
    T x T scores never exist. Elsewhere XLA does it.
    """
    T, C = q_BTHC.shape[1], q_BTHC.shape[3]
    if platform() == "tpu" and T % 128 == 0 and C % 128 == 0:
        return _on_each_device(_splash_attention, q_BTHC, k_BTKC, v_BTKC, segments_BT)
    if platform() in ("gpu", "cuda") and T % 128 == 0 and C in (64, 128):
        return _on_each_device(_triton_attention, q_BTHC, k_BTKC, v_BTKC, segments_BT)
    earlier_TT = jnp.tril(jnp.ones((T, T), bool))
    return attend(q_BTHC, k_BTKC, v_BTKC, same_segment(segments_BT, segments_BT) & earlier_TT)


def _on_each_device(kernel: Callable, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array) -> Array:
    """Rows and heads are split over the ambient mesh, if there is one; each device runs the kernel on its own."""
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_BTHC, k_BTKC, v_BTKC, segments_BT)
    heads, kv_heads = spec("batch", None, "heads", None), spec("batch", None, "kv_heads", None)
    specs = (heads, kv_heads, kv_heads, spec("batch", None))
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)(q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _triton_attention(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array) -> Array:
    """As many key/value heads as query heads are what this kernel takes."""
    heads_a_group = q_BTHC.shape[2] // k_BTKC.shape[2]
    k_BTHC, v_BTHC = (jnp.repeat(x, heads_a_group, axis=2) for x in (k_BTKC, v_BTKC))
    blocks = gpu_attention.BlockSizes(
        block_q=64, block_k=64, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32
    )
    return gpu_attention.mha(
        q_BTHC, k_BTHC, v_BTHC, segments_BT, sm_scale=q_BTHC.shape[3] ** -0.5, causal=True, block_sizes=blocks
    )


def _splash_attention(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array) -> Array:
    T = q_BTHC.shape[1]
    q, kv = (next(size for size in (largest, 512, 256, 128) if T % size == 0) for largest in (512, 1024))
    blocks = splash_attention.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * q_BTHC.shape[2])
    kernel = splash_attention.make_splash_mha_single_device(mask, block_sizes=blocks)
    heads_first = (x.swapaxes(1, 2) for x in (q_BTHC * q_BTHC.shape[3] ** -0.5, k_BTKC, v_BTKC))
    segments = splash_attention.SegmentIds(q=segments_BT, kv=segments_BT)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)
