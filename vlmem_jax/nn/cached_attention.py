"""Attention of tokens that are appended to a cache: chunks of prompts, and decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kernels_pallas import Tables, append_to_cache
from kernels_pallas import cached_attention as read_cache
from kernels_pallas.cached_attention import tpu
from kernels_pallas.cached_attention.problem import Inputs, Problem
from kernels_pallas.device import platform
from kernels_pallas.memory_attention import reference
from vlmem_jax.nn.attention import attend
from vlmem_jax.nn.rope import Rotation, rotate
from vlmem_jax.runtime.sharding import even_spec, shards
from vlmem_jax.types import KVCache

CACHE_BLOCK = 512
"""Tokens, and slots of a cache, whose scores exist at the same time where no kernel serves."""


def appended_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    tables: Rotation,
    cache: KVCache,
    layer: Int32[Array, ""],
    index_BT: Int32[Array, "B T"],
    used: Int32[Array, ""] | int | None = None,
) -> tuple[Float[Array, "B T H C"], KVCache]:
    """Tokens go into slots `index_BT` of a layer of the cache, k turned, and attend to all slots up to their own.

    The slots of a row follow on each other; those beyond the capacity mean that there is no token, of which nothing is
    kept and what comes out means nothing. `used`: no row fills more slots. On a TPU the kernels of kernels_pallas write
    and read the cache as it lies, each row as far as it is filled, see `cache_backend`; elsewhere XLA does it.
    """
    own = cache_backend(q_BTHC, cache)
    k_BTKC = rotate(k_BTKC, tables)
    if own is not None:
        return _by_kernel(own, q_BTHC, k_BTKC, v_BTKC, tables, cache, layer, index_BT)
    q_BTHC, cache = rotate(q_BTHC, tables), cache.write(layer, k_BTKC, v_BTKC, index_BT)
    if used is not None:
        return filled_attention(q_BTHC, cache, layer, index_BT, used), cache
    return cached_attention(q_BTHC, *cache.layer(layer), index_BT), cache


def cache_backend(q_BTHC: Float[Array, "B T H C"], cache: KVCache) -> str | None:
    """The backend of the kernels that read and write a cache, or None: on other platforms, of a cache in 8 bits, of
    heads that are not 128 wide, and where kv heads do not go round the devices that share them."""
    if platform() != "tpu" or cache.k_LBKSC.shape[2] % shards("kv_heads"):
        return None
    inputs = Inputs(q_BTHC, cache.k_LBKSC, cache.v_LBKSC, *(None,) * 3)
    return "tpu" if tpu.unsupported(Problem(), inputs) is None else None


def _by_kernel(
    backend: str,
    q_BTHC: Array,
    k_BTKC: Array,
    v_BTKC: Array,
    tables: Rotation,
    cache: KVCache,
    layer: Array,
    index_BT: Array,
) -> tuple[Array, KVCache]:
    """Each device does it with its own rows and heads."""

    def each(q, k, v, cos, sin, k_cache, v_cache, layer, index):
        slots = k_cache.shape[3]
        place = {"layer": layer, "start": index[:, 0], "count": (index < slots).sum(axis=1, dtype=jnp.int32)}
        kept = append_to_cache((k_cache, v_cache), (k, v), **place, implementation=backend)
        turn = Tables(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
        return read_cache(q, *kept, **place, positions=turn, implementation=backend), *kept

    arrays = q_BTHC, k_BTKC, v_BTKC, *tables, cache.k_LBKSC, cache.v_LBKSC, jnp.asarray(layer), index_BT
    if not jax.sharding.get_abstract_mesh().empty:
        heads, kv_heads = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
        kept = (None, "batch", "kv_heads", None, None)
        meanings = heads, kv_heads, kv_heads, *(("batch", None, None),) * 2, kept, kept, (), ("batch", None)
        specs = tuple(even_spec(x.shape, *names) for x, names in zip(arrays, meanings, strict=True))
        out = specs[0], specs[5], specs[6]
        each = jax.shard_map(each, in_specs=specs, out_specs=out, check_vma=False)
    out_BTHC, k_LBKSC, v_LBKSC = each(*arrays)
    return out_BTHC, KVCache(k_LBKSC, v_LBKSC, None, None)


def cached_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    index_BT: Int32[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Attention of tokens that stand in slots `index_BT` of a cache to all slots up to their own.

    Of more than a few tokens the scores never exist at once: blocks of queries meet blocks of keys, as far as the cache
    is filled. What comes out for a token beyond the capacity means nothing.
    """
    T, S = index_BT.shape[1], k_BSKC.shape[1]
    if T <= CACHE_BLOCK:
        return attend(q_BTHC, k_BSKC, v_BSKC, jnp.arange(S) <= index_BT[:, :, None])
    blocks, block = -(-T // CACHE_BLOCK), min(CACHE_BLOCK, S)

    def in_blocks(x):
        x = jnp.pad(x, ((0, 0), (0, blocks * CACHE_BLOCK - T)) + ((0, 0),) * (x.ndim - 2), mode="edge")
        return x.reshape(x.shape[0], blocks, CACHE_BLOCK, *x.shape[2:]).swapaxes(0, 1)

    def queries(block_of):
        q_BQHC, index_BQ = block_of
        used = jnp.where(index_BQ < S, index_BQ, 0).max() + 1

        def keys(n, so_far):
            start = jnp.minimum(n * block, S - block)  # the last block begins where a whole one fits
            k_BPKC, v_BPKC = (jax.lax.dynamic_slice_in_dim(x, start, block, 1) for x in (k_BSKC, v_BSKC))
            slots_P = start + jnp.arange(block)
            allowed_BQP = (slots_P >= n * block) & (slots_P <= index_BQ[..., None])
            return merged(so_far, reference.attend(q_BQHC, k_BPKC, v_BPKC, allowed=allowed_BQP))

        out_BQHC = jnp.zeros(q_BQHC.shape, jnp.float32)
        lse_BHQ = jnp.full(out_BQHC.shape[:3], -jnp.inf).swapaxes(1, 2)
        return jax.lax.fori_loop(0, -(-used // block), keys, (out_BQHC, lse_BHQ))[0].astype(q_BQHC.dtype)

    out = jax.lax.map(queries, (in_blocks(q_BTHC), in_blocks(index_BT)))
    return out.swapaxes(0, 1).reshape(q_BTHC.shape[0], -1, *q_BTHC.shape[2:])[:, :T]


def filled_attention(
    q_BTHC: Float[Array, "B T H C"],
    cache: KVCache,
    layer: Int32[Array, ""],
    index_BT: Int32[Array, "B T"],
    used: Int32[Array, ""] | int,
) -> Float[Array, "B T H C"]:
    """`cached_attention` to one layer of a cache of which no row fills more than the first `used` slots.

    Blocks behind these are not read. What a row gets does not depend on how many are: a block of which it may see
    nothing changes no bit.
    """
    S = cache.k_LBKSC.shape[3]
    block = min(CACHE_BLOCK, S)

    def keys(n, so_far):
        start = jnp.minimum(n * block, S - block)  # the last block begins where a whole one fits
        k_BPKC, v_BPKC = cache.block(layer, start, block)
        slots_P = start + jnp.arange(block)
        allowed_BTP = (slots_P >= n * block) & (slots_P <= index_BT[..., None])
        return merged(so_far, reference.attend(q_BTHC, k_BPKC, v_BPKC, allowed=allowed_BTP))

    out_BTHC = jnp.zeros(q_BTHC.shape, jnp.float32)
    lse_BHT = jnp.full(out_BTHC.shape[:3], -jnp.inf).swapaxes(1, 2)
    return jax.lax.fori_loop(0, -(-used // block), keys, (out_BTHC, lse_BHT))[0].astype(q_BTHC.dtype)


Part = tuple[Float[Array, "B T H C"], Float[Array, "B H T"]]
"""Attention to some of the keys, and the log-sum-exp of their scores; -inf where there were none."""


def merged(one: Part, other: Part) -> Part:
    """Attention to the keys of both, in fp32."""
    lse_BHT = jnp.logaddexp(one[1], other[1])
    top_BHT = jnp.where(jnp.isfinite(lse_BHT), lse_BHT, 0.0)
    each = ((out, jnp.exp(part - top_BHT).swapaxes(1, 2)[..., None]) for out, part in (one, other))
    return sum(out.astype(jnp.float32) * weight for out, weight in each), lse_BHT
