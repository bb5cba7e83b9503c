"""cached_attention: tokens that were just put into a cache read it, as far as it is filled."""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import backends, rotary
from kernels_pallas.backends import Implementation
from kernels_pallas.cached_attention.problem import Inputs, Positions, Problem
from kernels_pallas.memory_attention import reference

_backend = functools.partial(backends.module, __package__)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    layer: jax.Array | int,
    start: jax.Array,
    count: jax.Array,
    positions: Positions = None,
    theta: float = 1e6,
    implementation: Implementation | None = None,
    chip: str | None = None,
) -> jax.Array:
    """o [B, T, H, C] of tokens q [B, T, H, C] over a layer of a cache k, v [L, B, K, S, C]; K divides H.

    Row b has `count[b]` tokens, which stand in slots from `start[b]` on, and sees all slots up to its own: a chunk of
    a prompt, or the one token of a decoding step (T = 1). Slots behind them take no time. The o of what is no token,
    and of a row without any, is zero. k is turned already, as it came into the cache; q turns by positions [B, T]:
    integers, or tables (`rotary_tables`, `tables_of_angles`); None: it is turned already. There are no gradients.
    implementation: None takes the best that serves here, see `choose`; the interpreted ones run anywhere. chip: "v5e",
    "v5p" or "v6e", when it is not that of the ambient mesh or the default device.

    Raises: ValueError for shapes, types or a head dim that no backend or not the named one serves.
    """
    inputs = Inputs(q, k, v, jnp.asarray(layer, jnp.int32), start, count, positions)
    _check(inputs)
    problem = Problem(float(theta), chip or backends.chip(), str(implementation).endswith("_interpret"))
    name, reason = backends.choose(__package__, problem, inputs, implementation)
    if name is None:
        raise ValueError(f"cached_attention: implementation={implementation!r} cannot serve: {reason}")
    return _plain(inputs, theta) if name == "xla" else _backend(name).forward(problem, inputs)


def append_to_cache(
    cache: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    *,
    layer: jax.Array | int,
    start: jax.Array,
    count: jax.Array,
    implementation: Implementation,
    chip: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """k, v [L, B, K, S, C] of a cache with the first `count[b]` of new keys and values [B, T, K, C] of a row in its
    slots from `start[b]` on, where they fit; written in place where the cache is donated.

    implementation: the TPU kernel that `choose` named for reading the cache. What XLA would write lies otherwise than
    that kernel reads it. Raises ValueError for another.
    """
    if implementation not in ("tpu", "tpu_interpret"):
        raise ValueError(f"a cache is appended to by implementation tpu or tpu_interpret, got {implementation!r}")
    problem = Problem(chip=chip or backends.chip(), interpret=implementation.endswith("_interpret"))
    return _backend(implementation).append(problem, cache, new, (jnp.asarray(layer, jnp.int32), start, count))


def choose(inputs: Inputs, implementation: Implementation | None = None) -> tuple[str | None, str]:
    """(name, why) of the backend that serves, see `backends.choose`."""
    return backends.choose(__package__, Problem(chip=backends.chip()), inputs, implementation)


def _plain(inputs: Inputs, theta: float) -> jax.Array:
    tables = inputs.positions
    if tables is not None and not isinstance(tables, rotary.Tables):
        tables = rotary.rotary_tables(tables, theta, inputs.q.shape[-1])
    k, v = (x[inputs.layer].swapaxes(1, 2) for x in (inputs.k, inputs.v))
    return reference.attend(inputs.q, k, v, q_tables=tables, allowed=inputs.allowed())[0]


def _check(inputs: Inputs) -> None:
    q, k, v = inputs[:3]
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q must be floating [batch, tokens, heads, head_dim], got {q.dtype} {q.shape}")
    batch, tokens, heads, width = q.shape
    if k.ndim != 5 or k.shape[1] != batch or k.shape[4] != width:
        raise ValueError(f"k must be [layers, {batch}, kv_heads, slots, {width}] as q is {q.shape}, got {k.shape}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {k.shape}, got {v.shape}")
    if heads % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of kv heads, got q {q.shape} and k {k.shape}")
    for name, x in (("start", inputs.start), ("count", inputs.count)):
        if x.shape != (batch,) or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers of shape {(batch,)}, got {x.dtype} {x.shape}")
    tables, wanted = inputs.positions, (batch, tokens)
    if isinstance(tables, rotary.Tables):
        if tables.cos.shape != (*wanted, width) or tables.sin.shape != tables.cos.shape:
            raise ValueError(f"tables must be {(*wanted, width)}, got {tables.cos.shape} and {tables.sin.shape}")
    elif tables is not None and (tables.shape != wanted or not jnp.issubdtype(tables.dtype, jnp.integer)):
        raise ValueError(f"positions must be integers of shape {wanted}, got {tables.dtype} {tables.shape}")
