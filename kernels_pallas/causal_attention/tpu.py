"""TPU backend: pads to whole blocks, says which blocks meet, and calls the kernels."""

import math

import jax
import jax.numpy as jnp

from kernels_pallas import rotary
from kernels_pallas.causal_attention import blocks as block_sizes
from kernels_pallas.causal_attention import tpu_backward, tpu_forward
from kernels_pallas.causal_attention.problem import Inputs, Problem, Spec, meeting
from kernels_pallas.lanes import LANES, NEVER, halves, pad_heads, pad_row, unpad_heads, up

_LN2 = math.log(2)


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
    """Why this backend cannot serve, or None."""
    width = inputs.q.shape[-1]
    if width > LANES or width % 2:
        return f"head dim must be even and at most {LANES}, got {width}"
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {inputs.q.dtype}"
    if _blocks(problem, inputs, "backward") is None:
        return f"VMEM cannot hold the keys and values of a row of {inputs.q.shape[1]} tokens; use shorter rows"
    return None


def forward(problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] and lse [B, H, T] (natural; -inf of padding)."""
    (batch, length, heads, width), blocks = inputs.q.shape, _blocks(problem, inputs, "forward")
    spec, arrays = _prepare(problem, inputs, blocks)
    o, lse = tpu_forward.forward(spec, arrays, heads=heads, blocks=blocks)
    lse = lse.reshape(batch, heads, -1)[..., :length]
    return unpad_heads(o, length, width), jnp.where(lse == -NEVER, -jnp.inf, lse * _LN2)


def backward(
    problem: Problem, inputs: Inputs, o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and types of q, k, v."""
    (_, length, heads, width), blocks = inputs.q.shape, _blocks(problem, inputs, "backward")
    spec, arrays = _prepare(problem, inputs, blocks)
    rows = arrays["q"].shape[1]
    arrays |= {name: pad_heads(x, rows) for name, x in (("o", o), ("do", do))}
    log2 = jnp.where(jnp.isfinite(lse), lse / _LN2, -NEVER)
    more = ((0, 0), (0, 0), (0, rows - length))
    arrays["lse"], arrays["dlse"] = jnp.pad(log2, more, constant_values=-NEVER), jnp.pad(dlse, more)
    gradients = tpu_backward.backward(spec, arrays, heads=heads, blocks=blocks)
    return tuple(unpad_heads(x, length, width) for x in gradients)


def _blocks(problem: Problem, inputs: Inputs, direction: str) -> block_sizes.Blocks | None:
    (_, length, heads, _), kv_heads = inputs.q.shape, inputs.k.shape[2]
    find = block_sizes.forward if direction == "forward" else block_sizes.backward
    return find(length, heads, kv_heads, inputs.q.dtype.itemsize, problem.chip)


def _prepare(problem: Problem, inputs: Inputs, blocks: block_sizes.Blocks) -> tuple[Spec, dict[str, jax.Array]]:
    """The kernels' arrays, padded; of padding, queries have segment -1 and keys -2."""
    (batch, length, _, width), segments = inputs.q.shape, inputs.segments
    rows = up(length, blocks.rows)
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    arrays = {name: pad_heads(x, rows) for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v))}
    real = segments > 0
    arrays["q_segments"] = pad_row(jnp.where(real, segments, -1), rows, -1)
    arrays["k_segments"] = pad_row(jnp.where(real, segments, -2), rows, -2)
    if inputs.prefix is not None:
        arrays["q_prefix"] = pad_row(jnp.where(real & (inputs.prefix > 0), inputs.prefix, -1), rows, -1)
    if inputs.positions is not None:
        tables = inputs.positions
        if not isinstance(tables, rotary.Tables):
            tables = rotary.rotary_tables(tables, problem.theta, width)
        packed = rotary.packed(rotary.Tables(*map(halves, tables)))
        arrays["table"] = jnp.pad(packed, ((0, 0), (0, rows - length), (0, 0)))
    prefix = arrays["q_prefix"][:, 0] if "q_prefix" in arrays else None
    met = meeting(arrays["q_segments"][:, 0], prefix, blocks.rows, blocks.keys)
    spec = Spec(width, inputs.positions is not None, problem.chip, problem.interpret)
    return spec, arrays | {"tiles": met.tiles, "counts": met.counts}
