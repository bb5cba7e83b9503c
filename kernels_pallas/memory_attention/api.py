"""memory_attention: queries read a memory, without causality, with the rotation of both sides inside."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import backends, rotary
from kernels_pallas.backends import Implementation
from kernels_pallas.dhr import TileGrid
from kernels_pallas.memory_attention import reference
from kernels_pallas.memory_attention.problem import Inputs, Positions, Problem

_backend = functools.partial(backends.module, __package__)


def memory_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_pos: Positions = None,
    k_pos: Positions | TileGrid = None,
    theta: float = 1e6,
    k_rotated: bool = False,
    q_segments: jax.Array | None = None,
    k_segments: jax.Array | None = None,
    num_valid: jax.Array | None = None,
    limit: jax.Array | None = None,
    gate: jax.Array | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    chip: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] of queries q [B, T, H, C] over memory k, v [B, M, K, C]; K divides H. CoMemo (2506.06279) sec. 3.

    q_pos [B, T], k_pos [B, M]: integer positions (angles are made in the kernel), or `rotary_tables` of them, made once
    for all layers; None for no rotation. k_pos may be an image's `TileGrid`, too. k_rotated: k is turned already, as
    in a cache; q alone is.
    q_segments [B, T], k_segments [B, M]: equal ids see each other, 0 or less sees nothing. num_valid [B]: slots in use.
    limit [B, T]: a query sees slots below it. Queries without memory get exactly zero, and so do their gradients.
    gate: scalar; o is multiplied by tanh(gate). return_lse: also lse [B, H, T] fp32, natural, -inf without memory.
    implementation: None takes the best that serves here, see `choose`; the interpreted ones run anywhere.
    chip: "v5e", "v5p" or "v6e", when it is not that of the ambient mesh or the default device.

    Raises: ValueError for shapes, types or a head dim that no backend or not the named one serves.
    """
    if isinstance(k_pos, TileGrid):
        k_pos = k_pos.positions(*k.shape[:2])
    _check(q, k, v, q_pos, k_pos, k_rotated, q_segments, k_segments, num_valid, limit)
    inputs = Inputs(q, k, v, q_pos, k_pos, q_segments, k_segments, limit, num_valid)
    name, reason = choose(inputs, implementation)
    if name is None:
        raise ValueError(f"memory_attention: implementation={implementation!r} cannot serve: {reason}")
    if name == "xla":
        o, lse = _plain(inputs, theta)
    else:
        o, lse = _fused(name, Problem(float(theta), chip or backends.chip(), name.endswith("_interpret")), inputs)
    if gate is not None:
        o = (jnp.tanh(gate.astype(jnp.float32)).reshape(()) * o).astype(o.dtype)
    return (o, lse) if return_lse else o


def choose(inputs: Inputs, implementation: Implementation | None = None) -> tuple[str | None, str]:
    """(name, why) of the backend that serves: the one asked for, or the platform's kernel, else plain JAX.

    The name is None when the one asked for cannot serve.
    """
    return backends.choose(__package__, Problem(), inputs, implementation)


def _plain(inputs: Inputs, theta: float) -> tuple[jax.Array, jax.Array]:
    width = inputs.q.shape[-1]

    def tables(pos):
        return pos if pos is None or isinstance(pos, rotary.Tables) else rotary.rotary_tables(pos, theta, width)

    return reference.attend(
        inputs.q,
        inputs.k,
        inputs.v,
        q_tables=tables(inputs.q_pos),
        k_tables=tables(inputs.k_pos),
        allowed=inputs.allowed(),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(name: str, problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    return _backend(name).forward(problem, inputs)


def _fused_forward(name: str, problem: Problem, inputs: Inputs):
    o, lse = _backend(name).forward(problem, inputs)
    # jax.checkpoint may keep what would cost the whole kernel to make again
    o, lse = checkpoint_name(o, "memory_attention"), checkpoint_name(lse, "memory_attention")
    return (o, lse), (inputs, o, lse)


def _fused_backward(name: str, problem: Problem, kept, cotangents):
    inputs, o, lse = kept
    do, dlse = cotangents
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
    dq, dk, dv = _backend(name).backward(problem, inputs, o, lse, do.astype(o.dtype), dlse)
    nothing = jax.tree.map(backends.no_gradient, inputs)
    return (nothing._replace(q=dq, k=dk, v=dv),)


_fused.defvjp(_fused_forward, _fused_backward)


def _check(q, k, v, q_pos, k_pos, k_rotated, q_segments, k_segments, num_valid, limit) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, length, heads, head_dim], got shape {x.shape}")
        if x.dtype != q.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"q, k and v must share one floating type, got {name} {x.dtype} and q {q.dtype}")
    batch, num_queries, heads, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k must be [{batch}, slots, kv_heads, {width}] as q is {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")
    if k.shape[1] == 0 or num_queries == 0:
        raise ValueError(f"q and k must have at least one row, got q {q.shape}, k {k.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got q {q.shape} and k {k.shape}")
    if k_rotated and k_pos is not None:
        raise ValueError("k_pos must be None when k_rotated: k is turned already")
    if (q_pos is None) != (k_pos is None) and not (k_rotated and k_pos is None):
        raise ValueError("q_pos and k_pos must be given together; for a cache of turned keys pass k_rotated=True")
    if q_pos is not None and k_pos is not None and isinstance(q_pos, tuple) != isinstance(k_pos, tuple):
        raise ValueError("q_pos and k_pos must both be positions or both be tables")
    if (q_segments is None) != (k_segments is None):
        raise ValueError("q_segments and k_segments must be given together")
    q_rows, k_rows = (batch, num_queries), (batch, k.shape[1])
    for name, x, shape in (
        ("q_pos", q_pos, q_rows), ("k_pos", k_pos, k_rows), ("q_segments", q_segments, q_rows),
        ("k_segments", k_segments, k_rows), ("num_valid", num_valid, (batch,)), ("limit", limit, q_rows),
    ):  # fmt: skip
        if isinstance(x, rotary.Tables):
            if x.cos.shape != (*shape, width) or x.sin.shape != (*shape, width):
                raise ValueError(f"tables {name} must be {(*shape, width)}, got {x.cos.shape} and {x.sin.shape}")
        elif x is not None and (x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} must be integers of shape {shape}, got {x.dtype} {x.shape}")
