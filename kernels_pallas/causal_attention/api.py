"""causal_attention: causal self-attention of packed rows, with the rotation of q and k inside."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import backends, rotary
from kernels_pallas.backends import Implementation
from kernels_pallas.causal_attention.problem import Inputs, Positions, Problem
from kernels_pallas.memory_attention import reference

_backend = functools.partial(backends.module, __package__)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: Positions = None,
    theta: float = 1e6,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    chip: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] of tokens q [B, T, H, C] over themselves and earlier ones, k, v [B, T, K, C]; K divides H.

    positions [B, T]: integers by which q and k turn (RoPE-DHR, CoMemo 2506.06279 sec. 3.3), or tables of angles
    (`rotary_tables`, `tables_of_angles`), made once for all layers; None: no rotation.
    segments [B, T]: equal ids see each other, 0 or less is padding, which sees nothing: its o and gradients are zero.
    Blocks of tokens of other segments take no time. prefix [B, T], with segments: a token also sees earlier ones of the
    segment named there, as answers see their shared prompt; 0: none.
    return_lse: also lse [B, H, T] fp32, natural, -inf of padding. implementation: None takes the best that serves here,
    see `choose`; the interpreted ones run anywhere. chip: "v5e", "v5p" or "v6e", when it is not that of the
    ambient mesh or the default device.

    Raises: ValueError for shapes, types, a head dim or a length that no backend or not the named one serves.
    """
    _check(q, k, v, positions, segments, prefix)
    inputs = Inputs(q, k, v, positions, segments, prefix)
    problem = Problem(float(theta), chip or backends.chip(), str(implementation).endswith("_interpret"))
    name, reason = backends.choose(__package__, problem, inputs, implementation)
    if name is None:
        raise ValueError(f"causal_attention: implementation={implementation!r} cannot serve: {reason}")
    o, lse = _plain(inputs, theta) if name == "xla" else _fused(name, problem, inputs)
    return (o, lse) if return_lse else o


def choose(inputs: Inputs, implementation: Implementation | None = None) -> tuple[str | None, str]:
    """(name, why) of the backend that serves, see `backends.choose`."""
    return backends.choose(__package__, Problem(chip=backends.chip()), inputs, implementation)


def _plain(inputs: Inputs, theta: float) -> tuple[jax.Array, jax.Array]:
    tables = inputs.positions
    if tables is not None and not isinstance(tables, rotary.Tables):
        tables = rotary.rotary_tables(tables, theta, inputs.q.shape[-1])
    return reference.attend(*inputs[:3], q_tables=tables, k_tables=tables, allowed=inputs.allowed())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(name: str, problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    return _backend(name).forward(problem, inputs)


def _fused_forward(name: str, problem: Problem, inputs: Inputs):
    o, lse = _backend(name).forward(problem, inputs)
    # jax.checkpoint may keep what would cost the whole kernel to make again
    o, lse = checkpoint_name(o, "causal_attention"), checkpoint_name(lse, "causal_attention")
    return (o, lse), (inputs, o, lse)


def _fused_backward(name: str, problem: Problem, kept, cotangents):
    inputs, o, lse = kept
    do, dlse = cotangents
    dlse = jnp.where(jnp.isfinite(lse), dlse, 0.0)
    dq, dk, dv = _backend(name).backward(problem, inputs, o, lse, do.astype(o.dtype), dlse)
    nothing = jax.tree.map(backends.no_gradient, inputs)
    return (nothing._replace(q=dq, k=dk, v=dv),)


_fused.defvjp(_fused_forward, _fused_backward)


def _check(q, k, v, positions, segments, prefix) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, length, heads, head_dim], got shape {x.shape}")
        if x.dtype != q.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"q, k and v must share one floating type, got {name} {x.dtype} and q {q.dtype}")
    batch, length, heads, width = q.shape
    if k.shape[:2] != (batch, length) or k.shape[3] != width:
        raise ValueError(f"k must be [{batch}, {length}, kv_heads, {width}] as q is {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")
    if length == 0:
        raise ValueError(f"q must have at least one token, got {q.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got q {q.shape} and k {k.shape}")
    if prefix is not None and segments is None:
        raise ValueError("prefix names segments, so that segments must be given, too")
    for name, x in (("positions", positions), ("segments", segments), ("prefix", prefix)):
        if isinstance(x, rotary.Tables):
            if x.cos.shape != (batch, length, width) or x.sin.shape != x.cos.shape:
                raise ValueError(f"tables {name} must be {(batch, length, width)}, got {x.cos.shape} and {x.sin.shape}")
        elif x is not None and (x.shape != (batch, length) or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(f"{name} must be integers of shape {(batch, length)}, got {x.dtype} {x.shape}")
