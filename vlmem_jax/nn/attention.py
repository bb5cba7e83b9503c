"""Attention cores: what every head does between its projections. Softmax in fp32."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float, Int32

import kernels_pallas
from kernels_pallas import Tables, backends
from kernels_pallas.causal_attention import problem as packed
from kernels_pallas.device import platform
from kernels_pallas.memory_attention import reference
from kernels_pallas.memory_attention.blocks import LANES, MAX_SLOTS, up
from kernels_pallas.memory_attention.problem import Inputs
from vlmem_jax.nn import seen_blocks
from vlmem_jax.nn.rope import Rotation, rotate
from vlmem_jax.runtime.sharding import constrain, even_spec, shards

KERNEL_KEYS = 384
"""Keys that a kernel reads for a run of queries in windows: those of the run and of a window on either side. Of
256, 384 and 512, with windows of 64 on v5e, it takes the fewest cycles of both directions together."""


LONG = 8192
"""Tokens of a row from which on not all of their scores are stored at the same time where no kernel serves."""
BLOCK = 512
"""Tokens of a long row whose scores exist at the same time."""


PART_ENTRIES = 16
"""Most entries of a part of a bank: longer calls of the kernel are no faster, and a part is filled as a whole."""


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """How reads from a memory, and attention among the patches of a tile, are computed."""

    implementation: Literal["auto", "tpu", "gpu", "xla", "tpu_interpret", "gpu_interpret"] = "auto"
    """A backend of kernels_pallas; auto: the platform's kernel where it serves, else XLA. Those that interpret run a
    kernel anywhere, slowly."""


def attend(
    q_BTHC: Float[Array, "B T H C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    allowed_BTS: Bool[Array, "B T S"] | None,
) -> Float[Array, "B T H C"]:
    """softmax(q k^T / sqrt(C)) v over the allowed keys; each key/value head serves H/K neighbouring query heads.

    A query that may attend to nothing gets zero.
    """
    return reference.attend(q_BTHC, k_BSKC, v_BSKC, allowed=allowed_BTS)[0]


def memory_attention(
    config: AttentionConfig,
    q_BTHC: Float[Array, "B T H C"],
    k_BMKC: Float[Array, "B M K C"],
    v_BMKC: Float[Array, "B M K C"],
    q_tables: Tables,
    k_tables: Tables | None,
    segments_BT: Int32[Array, "B T"],
    segments_BM: Int32[Array, "B M"],
) -> Float[Array, "B T H C"]:
    """Attention to all memory slots of the same sample, without causality; q and k are turned inside.

    k_tables None: k is turned already, as in a cache. On the ambient mesh, if there is one, each device runs the
    kernel on its rows, tokens and heads; every device holds all slots of its rows.
    """
    arrays = {"q": q_BTHC, "k": k_BMKC, "v": v_BMKC, "q_pos": q_tables}
    arrays |= {"q_segments": segments_BT, "k_segments": segments_BM}
    if k_tables is not None:
        arrays["k_pos"] = k_tables
    return _attend_by_kernel(config, arrays, "batch", "tokens", k_rotated=k_tables is None)


def full_attention(
    config: AttentionConfig,
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    length: int,
) -> Float[Array, "B T H C"]:
    """Every query sees the first `length` keys of its row, as among the patches of a tile. The T x T scores never exist
    in memory where a kernel serves; none of those that JAX ships takes any T and C, that for memories does. Elsewhere
    those of a block of queries do, where there are many."""
    arrays = {"q": q_BTHC, "k": k_BTKC, "v": v_BTKC}
    T = q_BTHC.shape[1]
    if T > LONG and _backend(config, Inputs(**arrays)) == "xla":
        k_BTKC, v_BTKC = k_BTKC[:, :length], v_BTKC[:, :length]
        q_BTHC = jnp.pad(q_BTHC, ((0, 0), (0, -T % BLOCK), (0, 0), (0, 0)))
        blocks = q_BTHC.reshape(len(q_BTHC), -1, BLOCK, *q_BTHC.shape[2:]).swapaxes(0, 1)
        out = jax.lax.map(lambda q_BTHC: attend(q_BTHC, k_BTKC, v_BTKC, None), blocks)
        return out.swapaxes(0, 1).reshape(q_BTHC.shape)[:, :T]
    if length < k_BTKC.shape[1]:
        arrays["num_valid"] = jnp.full(len(q_BTHC), length, jnp.int32)
    return _attend_by_kernel(config, arrays, "parts", None)


def segment_attention(
    config: AttentionConfig,
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Every query sees the keys of its segment, as among the patches of a frame; computed as `full_attention`."""
    arrays = {"q": q_BTHC, "k": k_BTKC, "v": v_BTKC, "q_segments": segments_BT, "k_segments": segments_BT}
    return _attend_by_kernel(config, arrays, "batch", "tokens")


def window_attention(
    config: AttentionConfig,
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
    longest: int,
) -> Float[Array, "B T H C"]:
    """Every query sees the keys of its segment, where segments are stretches of at most `longest` neighbours.

    So a run of queries meets its own keys and `longest` on either side alone, however long the row. Runs are as short
    as can be where scores are stored, and longer where a kernel keeps them on the chip.
    """
    B, T = segments_BT.shape
    stored = _backend(config, Inputs(q_BTHC, k_BTKC, v_BTKC)) == "xla"
    run = longest if stored else max(longest, KERNEL_KEYS - 2 * longest)
    runs = -(-T // run)

    def own(x):
        x = jnp.pad(x, ((0, 0), (0, runs * run - T)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(B, runs, run, *x.shape[2:])

    def near(x):
        x = own(x)
        nothing = jnp.zeros_like(x[:, :1, :longest])
        before = jnp.concatenate([nothing, x[:, :-1, run - longest :]], axis=1)
        after = jnp.concatenate([x[:, 1:, :longest], nothing], axis=1)
        return jnp.concatenate([before, x, after], axis=2)

    arrays = {"q": own(q_BTHC), "k": near(k_BTKC), "v": near(v_BTKC)}
    arrays |= {"q_segments": own(segments_BT), "k_segments": near(segments_BT)}
    arrays = {name: x.reshape(B * runs, *x.shape[2:]) for name, x in arrays.items()}
    out = _attend_by_kernel(config, arrays, "parts", None)
    return out.reshape(B, runs * run, *q_BTHC.shape[2:])[:, :T]


def bank_parts(entries: int, tokens: int) -> tuple[int, int]:
    """X and M of a bank of so many entries, each of so many tokens: parts of equally many whole entries, as many as a
    call of the kernel holds, and slots of each part, as the kernel reads them."""
    parts = -(-entries // min(PART_ENTRIES, max(MAX_SLOTS // tokens, 1)))
    return parts, up(-(-entries // max(parts, 1)) * tokens, LANES)


def bank_attention(
    config: AttentionConfig,
    q_BTHC: Float[Array, "B T H C"],
    k_BXMD: Float[Array, "B X M D"],
    v_BXMD: Float[Array, "B X M D"],
    valid_BX: Int32[Array, "B X"],
) -> Float[Array, "B T H C"]:
    """Every query sees the first `valid` of the M slots of each of the X parts of its row's bank, D = H C.

    The kernel reads a bank as it lies, nothing of it is copied: a part is a row of its batch, and what it reads of the
    parts is merged by their log-sum-exp. Every device holds whole banks of its rows.
    """
    (B, X, M, _), (T, H, C) = k_BXMD.shape, q_BTHC.shape[1:]
    arrays = {"q": jnp.repeat(q_BTHC.astype(k_BXMD.dtype), X, axis=0), "num_valid": valid_BX.reshape(B * X)}
    arrays |= {name: x.reshape(B * X, M, H, C) for name, x in (("k", k_BXMD), ("v", v_BXMD))}
    if X == 1:
        return _attend_by_kernel(config, arrays, "batch", None, None)
    out, lse = _attend_by_kernel(config, arrays, "batch", None, None, return_lse=True)
    lse_BXHT = lse.reshape(B, X, H, T)
    top_B1HT = jax.lax.stop_gradient(lse_BXHT.max(axis=1, keepdims=True))
    weights_BXHT = jnp.exp(lse_BXHT - jnp.where(jnp.isfinite(top_B1HT), top_B1HT, 0.0))
    total_B1HT = weights_BXHT.sum(axis=1, keepdims=True)
    shares_BXHT = weights_BXHT / jnp.where(total_B1HT > 0, total_B1HT, 1.0)
    merged_BTHC = jnp.einsum("bxht,bxthc->bthc", shares_BXHT, out.reshape(B, X, T, H, C).astype(shares_BXHT.dtype))
    return merged_BTHC.astype(q_BTHC.dtype)


def kernel_length(config: AttentionConfig, length: int) -> int:
    """Length from which the backend's kernel reads arrays as they lie; others it copies to pad them."""
    wanted = config.implementation if config.implementation != "auto" else platform()
    return up(length, LANES) if wanted in ("tpu", "tpu_interpret") else length


def _attend_by_kernel(
    config: AttentionConfig, arrays: dict, rows: str, length: str | None, heads: str | None = "heads", **options
) -> Any:
    """`kernels_pallas.memory_attention` of `arrays`, by device; `rows`, `length`, `heads`: what the axes of the queries
    mean."""
    name = _backend(config, Inputs(**arrays))
    call = functools.partial(kernels_pallas.memory_attention, implementation=name, **options)
    meaning = {"q": (rows, length, heads, None), "q_pos": (rows, length, None)}
    meaning |= {"q_segments": (rows, length), "k_segments": (rows, None), "k_pos": (rows, None, None)}
    meaning |= {"num_valid": (rows,)}
    meaning |= dict.fromkeys(("k", "v"), (rows, None, heads, None))
    if jax.sharding.get_abstract_mesh().empty or name == "xla":
        return call(**arrays | {n: constrain(arrays[n], *meaning[n]) for n in ("k", "v")})
    specs = {n: jax.tree.map(lambda leaf, n=n: even_spec(leaf.shape, *meaning[n]), x) for n, x in arrays.items()}
    out = specs["q"]
    if options.get("return_lse"):
        out = out, even_spec(tuple(arrays["q"].shape[axis] for axis in (0, 2, 1)), rows, heads, length)
    each = jax.shard_map(lambda arrays: call(**arrays), in_specs=(specs,), out_specs=out, check_vma=False)
    return each(arrays)


def _backend(config: AttentionConfig, inputs: Inputs) -> str:
    """The backend that serves; if the one asked for cannot, still that one, which says why when it is called."""
    wanted = None if config.implementation == "auto" else config.implementation
    return kernels_pallas.choose(inputs, wanted)[0] or config.implementation


def same_segment(segments_BT: Int32[Array, "B T"], segments_BS: Int32[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Pairs that belong to one sample; segment 0 is padding and matches nothing."""
    return (segments_BT[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)


def causal_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    segments_BT: Int32[Array, "B T"],
    tables: Rotation | None = None,
    prefix_BT: Int32[Array, "B T"] | None = None,
) -> Float[Array, "B T H C"]:
    """Self-attention to earlier tokens of the same sample; order is by index, since rotary positions may repeat.

    A token also sees the earlier ones of the segment `prefix_BT`, 0: none, as answers see the prompt that they share.
    q and k are turned by `tables`, if there are any. On a TPU and on a GPU the kernel of kernels_pallas turns them and
    skips other samples; of rows that a TPU's memory cannot hold, JAX's own kernel sees the whole triangle where the
    shapes allow (T and C multiples of 128) and there is no prefix. They keep no T x T scores. Elsewhere XLA does it.
    """
    T, C = q_BTHC.shape[1], q_BTHC.shape[3]
    own = packed_backend(q_BTHC, k_BTKC)
    if own is not None:
        kernel = functools.partial(_packed_attention, own, prefix_BT is not None)
        prefixes = () if prefix_BT is None else (prefix_BT,)
        return _on_each_device(kernel, q_BTHC, k_BTKC, v_BTKC, segments_BT, *prefixes, *(tables or ()))
    if tables is not None:
        q_BTHC, k_BTKC = rotate(q_BTHC, tables), rotate(k_BTKC, tables)
    if prefix_BT is not None:
        return _on_each_device(_prefixed_attention, q_BTHC, k_BTKC, v_BTKC, segments_BT, prefix_BT)
    kernel = _plain_attention
    if platform() == "tpu" and T % 128 == 0 and C % 128 == 0:
        kernel = _splash_attention
    return _on_each_device(kernel, q_BTHC, k_BTKC, v_BTKC, segments_BT)


def packed_backend(q_BTHC: Float[Array, "B T H C"], k_BTKC: Float[Array, "B T K C"]) -> str | None:
    """The backend of the causal kernel that serves, or None."""
    if q_BTHC.shape[1] < LANES:
        return None
    name, _ = backends.choose(
        packed.__package__, packed.Problem(chip=backends.chip()), packed.Inputs(q_BTHC, k_BTKC, k_BTKC)
    )
    return None if name == "xla" else name


def _on_each_device(
    kernel: Callable, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array, *others_BT: Array
) -> Array:
    """Rows and heads are split over the ambient mesh, if there is one; each device runs the kernel on its own.

    Where tokens are split, they are exchanged for heads: a device gets whole rows of some heads (DeepSpeed-Ulysses,
    arXiv 2309.14509), so that causal work is even and any kernel serves.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(q_BTHC, k_BTKC, v_BTKC, segments_BT, *others_BT)
    parts, heads, kv_heads = shards("sequence_heads"), q_BTHC.shape[2], k_BTKC.shape[2]
    if heads % parts == 0 and kv_heads % parts:  # too few to go round: some are given to several devices
        k_BTKC, v_BTKC = (jnp.repeat(x, parts // math.gcd(kv_heads, parts), axis=2) for x in (k_BTKC, v_BTKC))
    q_spec, kv_spec = (even_spec(x.shape, "batch", None, "sequence_heads", None) for x in (q_BTHC, k_BTKC))
    rows = (even_spec(x.shape, "batch", *(None,) * (x.ndim - 1)) for x in (segments_BT, *others_BT))
    each = jax.shard_map(kernel, in_specs=(q_spec, kv_spec, kv_spec, *rows), out_specs=q_spec, check_vma=False)
    return each(q_BTHC, k_BTKC, v_BTKC, segments_BT, *others_BT)


def _packed_attention(
    backend: str, prefixed: bool, q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array, *others_BT: Array
) -> Array:
    """`others_BT`: the prefix, if the row is `prefixed`, then cos and sin, if the kernel turns q and k."""
    prefix_BT, tables = None, None
    if prefixed:
        prefix_BT, *others_BT = others_BT
    if others_BT:
        cos, sin = others_BT
        tables = Tables(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
    return kernels_pallas.causal_attention(
        q_BTHC, k_BTKC, v_BTKC, positions=tables, segments=segments_BT, prefix=prefix_BT, implementation=backend
    )


def _plain_attention(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array) -> Array:
    T = q_BTHC.shape[1]
    earlier_TT = jnp.tril(jnp.ones((T, T), bool))
    return attend(q_BTHC, k_BTKC, v_BTKC, same_segment(segments_BT, segments_BT) & earlier_TT)


def _prefixed_attention(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array, prefix_BT: Array) -> Array:
    T = q_BTHC.shape[1]
    if T > 2 * seen_blocks.BLOCK:
        return seen_blocks.seen_attention(q_BTHC, k_BTKC, v_BTKC, segments_BT, prefix_BT)
    shared_BT = jnp.where(segments_BT > 0, prefix_BT, 0)  # padding names no prefix, and a prefix of 0 meets nothing
    seen_BTT = same_segment(segments_BT, segments_BT) | same_segment(shared_BT, segments_BT)
    return attend(q_BTHC, k_BTKC, v_BTKC, seen_BTT & jnp.tril(jnp.ones((T, T), bool)))


def _splash_attention(q_BTHC: Array, k_BTKC: Array, v_BTKC: Array, segments_BT: Array) -> Array:
    T = q_BTHC.shape[1]
    q, kv = (next(size for size in (largest, 512, 256, 128) if T % size == 0) for largest in (512, 1024))
    blocks = T // kv
    # the backward kernel writes a part of dq for each block of so many keys: about four of them
    many = kv * max(n for n in range(1, max(blocks // 4, 1) + 1) if blocks % n == 0)
    sizes = splash_attention.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=many, block_kv_dkv_compute=kv,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * q_BTHC.shape[2])
    kernel = splash_attention.make_splash_mha_single_device(
        mask, block_sizes=sizes, residual_checkpoint_name="causal_attention"
    )
    heads_first = (x.swapaxes(1, 2) for x in (q_BTHC * q_BTHC.shape[3] ** -0.5, k_BTKC, v_BTKC))
    segments = splash_attention.SegmentIds(q=segments_BT, kv=segments_BT)
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)
