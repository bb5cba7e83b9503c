"""GPU backend: the kernels of memory attention, to which a row is its own memory, where a token reaches what stands
before it. XLA turns keys, once; the kernels turn queries.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import rotary
from kernels_pallas.causal_attention.problem import Inputs, Problem
from kernels_pallas.memory_attention import gpu
from kernels_pallas.memory_attention import problem as memory


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
    """Why this backend cannot serve, or None."""
    return gpu.unsupported(memory.Problem(), memory.Inputs(*inputs[:3]))


def forward(problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] and lse [B, H, T] (natural; -inf of padding)."""
    return gpu.forward(*_as_memory(problem, inputs))


def backward(
    problem: Problem, inputs: Inputs, o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and types of q, k, v."""
    problem, turned = _as_memory(problem, inputs)
    dq, dk, dv = gpu.backward(problem, turned, o, lse, do, dlse)
    if turned.q_pos is not None:
        dk = rotary.rotate(dk, turned.q_pos, inverse=True).astype(dk.dtype)
    return dq, dk, dv


def _as_memory(problem: Problem, inputs: Inputs) -> tuple[memory.Problem, memory.Inputs]:
    batch, length, _, width = inputs.q.shape
    tables, k = inputs.positions, inputs.k
    if tables is not None:
        if not isinstance(tables, rotary.Tables):
            tables = rotary.rotary_tables(tables, problem.theta, width)
        k = rotary.rotate(k, tables).astype(k.dtype)
    limit = jnp.broadcast_to(jnp.arange(1, length + 1), (batch, length))
    segments = inputs.segments
    row = memory.Inputs(inputs.q, k, inputs.v, tables, None, segments, segments, limit, q_prefix=inputs.prefix)
    return memory.Problem(problem.theta, problem.chip, problem.interpret), row
