"""GPU backend: Pallas on Triton, as it serves any head dim and full fp32 and is interpreted, lowered and compiled
without a GPU. jax 0.11 deprecates it for Mosaic GPU, whose fp32 matmuls are TF32, and still has it in 0.12.

Angles of integer positions are tables that XLA makes (fp32, one for all heads); turned q and k never leave registers
and shared memory. A call with too few blocks of queries to fill the chip, as in decoding, splits the slots over grid
steps and merges the parts by their log-sum-exp.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import rotary
from kernels_pallas.memory_attention import blocks as block_sizes
from kernels_pallas.memory_attention import gpu_kernels
from kernels_pallas.memory_attention.gpu_kernels import NEVER, Spec
from kernels_pallas.memory_attention.problem import Inputs, Problem, reach, spans

MAX_HEAD_DIM = 256
COMPUTE_CAPABILITY = 8.0


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
    """Why this backend cannot serve, or None."""
    width = inputs.q.shape[-1]
    if width > MAX_HEAD_DIM or width % 2:
        return f"head dim must be even and at most {MAX_HEAD_DIM}, got {width}"
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {inputs.q.dtype}"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)
    if isinstance(capability, str) and capability[0].isdigit() and float(capability) < COMPUTE_CAPABILITY:
        return f"the GPU must have compute capability {COMPUTE_CAPABILITY}, got {capability}"
    return None


def forward(problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] and lse [B, H, T] (natural; -inf without memory)."""
    inputs = inputs.by_query()
    batch, queries, heads, width = inputs.q.shape
    num_slots, kv_heads = inputs.k.shape[1:3]
    group = heads // kv_heads
    blocks = block_sizes.gpu("forward", queries * group, width, inputs.q.dtype)
    row_blocks = pl.cdiv(queries * group, blocks.rows)
    splits = 1
    if inputs.q_prefix is None:  # then slots in reach lie in one stretch, which can be split
        splits = block_sizes.gpu_splits(row_blocks * kv_heads * batch, pl.cdiv(num_slots, blocks.slots))
    outputs = {
        "o": jax.ShapeDtypeStruct(
            (splits, batch, queries, kv_heads, group, width), inputs.q.dtype if splits == 1 else jnp.float32
        ),
        "lse": jax.ShapeDtypeStruct((splits, batch, kv_heads, group, queries), jnp.float32),
    }
    o, lse = _run(problem, inputs, blocks, gpu_kernels.forward_kernel, {}, outputs, (row_blocks, splits), splits=splits)
    if splits > 1:
        o, lse = _merge(o, lse)
    return o.astype(inputs.q.dtype).reshape(inputs.q.shape), lse.reshape(batch, heads, queries)


def backward(
    problem: Problem, inputs: Inputs, o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and types of q, k, v."""
    inputs = inputs.by_query()
    batch, queries, heads, width = inputs.q.shape
    num_slots, kv_heads = inputs.k.shape[1:3]
    group = heads // kv_heads
    delta = jnp.einsum("bthc,bthc->bht", o.astype(jnp.float32), do.astype(jnp.float32))
    if dlse is not None:
        delta -= dlse
    log2 = jnp.where(jnp.isfinite(lse), lse / math.log(2), -NEVER)
    rows = (batch, kv_heads, group, queries)
    given = {"lse": log2.reshape(rows), "delta": delta.reshape(rows), "do": _by_group(do, kv_heads)}

    blocks = block_sizes.gpu("dq", queries * group, width, inputs.q.dtype)
    outputs = {"dq": jax.ShapeDtypeStruct(given["do"].shape, inputs.q.dtype)}
    grid = (pl.cdiv(queries * group, blocks.rows), 1)
    (dq,) = _run(problem, inputs, blocks, gpu_kernels.dq_kernel, given, outputs, grid)

    blocks = block_sizes.gpu("dkv", queries * group, width, inputs.q.dtype)
    outputs = {name: jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype) for name in ("dk", "dv")}
    grid = (pl.cdiv(num_slots, blocks.slots), 1)
    dk, dv = _run(problem, inputs, blocks, gpu_kernels.dkv_kernel, given, outputs, grid)
    return dq.reshape(inputs.q.shape), dk, dv


def _merge(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax out of S over different slots: outputs [S, B, T, K, G, C], log-sum-exps [S, B, K, G, T]."""
    top = lse.max(axis=0)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(axis=0)
    shares = weights / jnp.where(total > 0, total, 1.0)
    return jnp.sum(jnp.moveaxis(shares, -1, 2)[..., None] * o, axis=0), top + jnp.log(total)


def _beside(own: jax.Array, prefix: jax.Array, by_slots: bool) -> jax.Array:
    """[.., 4]: both stretches, without what they have in common. A row's prefix lies before its segment, so the rows of
    a slot that it is the prefix of lie behind those of the slot's segment."""
    first, last = prefix[..., 0], prefix[..., 1]
    if by_slots:
        first = jnp.maximum(first, own[..., 1])
    else:
        last = jnp.minimum(last, own[..., 0])
    return jnp.concatenate([own, jnp.stack([first, last], axis=-1)], axis=-1)


def _by_group(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, H, C] to [B, T, K, G, C]."""
    batch, queries, heads, width = x.shape
    return x.reshape(batch, queries, kv_heads, heads // kv_heads, width)


def _run(problem: Problem, inputs: Inputs, blocks, kernel, given, outputs, grid, **options) -> list[jax.Array]:
    """Calls a kernel; given: its arrays beyond the inputs."""
    (num_slots, kv_heads), (queries, heads, width) = inputs.k.shape[1:3], inputs.q.shape[1:]
    group = heads // kv_heads
    arrays = {"q": _by_group(inputs.q, kv_heads), "k": inputs.k, "v": inputs.v, **given}
    for side, pos in (("q", inputs.q_pos), ("k", inputs.k_pos)):
        if pos is not None:
            tables = pos if isinstance(pos, rotary.Tables) else rotary.rotary_tables(pos, problem.theta, width)
            arrays[f"{side}_cos"], arrays[f"{side}_sin"] = tables
    if inputs.k_segments is not None:  # padding meets nothing
        arrays["q_segments"] = jnp.where(inputs.q_segments > 0, inputs.q_segments, -1).astype(jnp.int32)
        arrays["k_segments"] = jnp.where(inputs.k_segments > 0, inputs.k_segments, -2).astype(jnp.int32)
    if inputs.q_prefix is not None:
        sees = (inputs.q_segments > 0) & (inputs.q_prefix > 0)
        arrays["q_prefix"] = jnp.where(sees, inputs.q_prefix, -1).astype(jnp.int32)
    if inputs.limit is not None:
        arrays["limit"] = jnp.minimum(inputs.limit, num_slots).astype(jnp.int32)
    if inputs.k_segments is not None or inputs.limit is not None:
        by_slots = kernel is gpu_kernels.dkv_kernel

        def stretch(name: str) -> jax.Array:
            rows = (jnp.repeat(arrays[x], group, axis=1) if x in arrays else None for x in (name, "limit"))
            by_row, limit = rows
            reached = reach(by_row, arrays.get("k_segments"), limit, num_slots, blocks.rows, blocks.slots)
            return spans(reached.swapaxes(1, 2) if by_slots else reached)

        arrays["span"] = stretch("q_segments")
        if "q_prefix" in arrays:
            arrays["span"] = _beside(arrays["span"], stretch("q_prefix"), by_slots)
    spec = Spec(
        queries=queries,
        slots=num_slots,
        group=group,
        head_dim=width,
        turn_q=inputs.q_pos is not None,
        turn_k=inputs.k_pos is not None,
        segments=inputs.k_segments is not None,
        limit=inputs.limit is not None,
        prefix=inputs.q_prefix is not None,
        row_block=blocks.rows,
        slot_block=blocks.slots,
        interpret=problem.interpret,
    )
    return gpu_kernels.call(
        kernel, spec, arrays, outputs, grid,
        warps=blocks.warps, stages=blocks.stages, interpret=problem.interpret, **options,
    )  # fmt: skip
