"""TPU backend: pads the tokens to whole blocks and calls the kernel."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.cached_attention import blocks as block_sizes
from kernels_pallas.cached_attention import tpu_append, tpu_kernel
from kernels_pallas.cached_attention.problem import Inputs, Problem
from kernels_pallas.lanes import LANES, pad_heads, unpad_heads, up


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
    """Why this backend cannot serve, or None."""
    q, k = inputs.q, inputs.k
    if q.shape[-1] != LANES:
        return f"head dim must be {LANES}, since a cache is read as it lies, got {q.shape[-1]}"
    if q.dtype not in (jnp.bfloat16, jnp.float32) or k.dtype != q.dtype:
        return f"q and the cache must both be bfloat16 or float32, got q {q.dtype} and k {k.dtype}"
    if _blocks(inputs) is None:
        return f"slots must be a multiple of {LANES}, got {k.shape[3]}"
    return None


def forward(problem: Problem, inputs: Inputs) -> jax.Array:
    """o [B, T, H, C]."""
    (_, tokens, heads, width), blocks = inputs.q.shape, _blocks(inputs)
    rows = 1 if tokens == 1 else up(tokens, blocks.rows)
    arrays = {"q": pad_heads(inputs.q, rows), "k": _in_hbm(problem, inputs.k), "v": _in_hbm(problem, inputs.v)}
    if inputs.positions is not None:
        tables = inputs.positions
        if not isinstance(tables, rotary.Tables):
            tables = rotary.rotary_tables(tables, problem.theta, width)
        arrays["table"] = jnp.pad(rotary.packed(tables), ((0, 0), (0, rows - tokens), (0, 0)))
    arrays |= _scalars(inputs.layer, inputs.start, inputs.count, inputs.k.shape[3])
    o = tpu_kernel.forward(arrays, heads=heads, blocks=blocks, chip=problem.chip, interpret=problem.interpret)
    return unpad_heads(o, tokens, width)


def _blocks(inputs: Inputs) -> block_sizes.Blocks | None:
    (_, tokens, heads, _), (_, _, kv_heads, slots, _) = inputs.q.shape, inputs.k.shape
    return block_sizes.chosen(tokens, heads, kv_heads, slots)


def append(problem: Problem, cache: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], place: tuple):
    """Keys and values of a cache [L, B, K, S, C] with new ones [B, T, K, C]; place: layer, start and count."""
    slots, tokens = cache[0].shape[3], new[0].shape[1]
    window = block_sizes.window(tokens)
    rows = 1 if tokens == 1 else up(tokens, window)
    arrays = {"k_new": pad_heads(new[0], rows), "v_new": pad_heads(new[1], rows)}
    arrays |= {name: _in_hbm(problem, x) for name, x in zip("kv", cache, strict=True)}
    return tpu_append.append(arrays | _scalars(*place, slots), window, problem.chip, problem.interpret)


def _scalars(layer: jax.Array, start: jax.Array, count: jax.Array, slots: int) -> dict[str, jax.Array]:
    count = jnp.minimum(count, slots - start)
    return {"layer": layer.reshape(1), "start": start.astype(jnp.int32), "count": count.astype(jnp.int32)}


def _in_hbm(problem: Problem, cache: jax.Array) -> jax.Array:
    """A small cache would be copied to VMEM as a whole, for each layer, where XLA finds room for it."""
    return cache if problem.interpret else pltpu.with_memory_space_constraint(cache, pltpu.HBM)
