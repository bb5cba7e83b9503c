"""rope_dhr: the rotation alone, one pass over HBM, for causal self-attention with DHR or M-RoPE positions.

On TPUs it takes fewer cycles than XLA's fusion for rows of many tokens, more for single ones; attention kernels that
turn q and k themselves need neither (README.md).
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from kernels_pallas import device, rotary
from kernels_pallas.rope_dhr import gpu, tpu

Implementation = Literal["tpu", "gpu", "xla", "tpu_interpret", "gpu_interpret"]
_BACKENDS = {"tpu": tpu, "gpu": gpu, "tpu_interpret": tpu, "gpu_interpret": gpu}


def rope_dhr(
    x: jax.Array,
    positions: jax.Array | rotary.Tables,
    *,
    theta: float = 1e6,
    implementation: Implementation | None = None,
) -> jax.Array:
    """x [B, T, H, C] turned by integer positions [B, T], or by tables (`rotary_tables`, `tables_of_angles`).

    Angles are fp32; the result has x's type. implementation None: the platform's kernel where it serves, or plain
    JAX.

    Raises: ValueError for shapes or types that do not fit, or a head dim that the named kernel does not serve.
    """
    _check(x, positions)
    if implementation is None:
        platform = device.platform()
        serves = platform in _BACKENDS and _BACKENDS[platform].unsupported(x) is None
        implementation = platform if serves else "xla"
    if implementation == "xla":
        if not isinstance(positions, rotary.Tables):
            positions = rotary.rotary_tables(positions, theta, x.shape[-1])
        return rotary.rotate(x, positions).astype(x.dtype)
    if implementation not in _BACKENDS:
        raise ValueError(f"implementation must be one of {sorted([*_BACKENDS, 'xla'])} or None, got {implementation!r}")
    reason = _BACKENDS[implementation].unsupported(x)
    if reason is not None:
        raise ValueError(f"rope_dhr: implementation={implementation!r} cannot serve: {reason}")
    return _turn(float(theta), implementation, x, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _turn(theta: float, name: str, x: jax.Array, positions) -> jax.Array:
    return _call(theta, name, x, positions, inverse=False)


def _forward(theta, name, x, positions):
    return _turn(theta, name, x, positions), positions


def _backward(theta, name, positions, dy):
    return _call(theta, name, dy, positions, inverse=True), None


def _call(theta, name, x, positions, inverse):
    interpret = name.endswith("_interpret")
    return _BACKENDS[name].turn(x, positions, theta=theta, inverse=inverse, interpret=interpret)


_turn.defvjp(_forward, _backward)


def _check(x, positions) -> None:
    if x.ndim != 4 or x.shape[-1] % 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating [batch, length, heads, even head_dim], got {x.dtype} {x.shape}")
    if isinstance(positions, rotary.Tables):
        want = (*x.shape[:2], x.shape[3])
        if positions.cos.shape != want or positions.sin.shape != want:
            raise ValueError(f"tables must be {want}, got {positions.cos.shape} and {positions.sin.shape}")
    elif positions.shape != x.shape[:2] or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise ValueError(f"positions must be integers {x.shape[:2]}, got {positions.dtype} {positions.shape}")
