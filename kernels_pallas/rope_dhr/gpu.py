"""GPU kernel of the rotation (Pallas on Triton): a grid step turns some rows of some heads by the same angles."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels_pallas import rotary

ROWS = 16
HEADS = 8


def unsupported(x: jax.Array) -> str | None:
    """Why the kernel cannot serve, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, got {x.dtype}"
    return None


def _kernel(*refs, heads: int, given: bool, inverse: bool):
    *made_of, x_ref, o_ref = refs
    length, _, width = x_ref.shape
    half = width // 2
    lane = jnp.arange(pl.next_power_of_2(half))[None]
    row = (pl.program_id(0) * ROWS + jnp.arange(ROWS))[:, None]
    mask = (row < length) & (lane < half)
    if given:
        cos, sin = (
            plgpu.load(table.at[row, lane + start], mask=mask, other=0.0)
            for table, start in zip(made_of, (0, half), strict=True)
        )
    else:
        positions, frequencies = made_of
        position = plgpu.load(positions.at[row], mask=row < length, other=0).astype(jnp.float32)
        angle = position * plgpu.load(frequencies.at[lane], mask=lane < half, other=0.0)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
    sin = -sin if inverse else sin
    for h in range(heads):
        head = pl.program_id(1) * heads + h
        first, second = (
            plgpu.load(x_ref.at[row, head, lane + start], mask=mask, other=0.0).astype(jnp.float32)
            for start in (0, half)
        )
        for start, value in ((0, first * cos - second * sin), (half, second * cos + first * sin)):
            plgpu.store(o_ref.at[row, head, lane + start], value.astype(o_ref.dtype), mask=mask)


def turn(
    x: jax.Array, positions: jax.Array | rotary.Tables, *, theta: float, inverse: bool, interpret: bool = False
) -> jax.Array:
    """x [B, T, H, C] turned, or turned back."""
    batch, length, num_heads, width = x.shape
    heads = max(count for count in range(1, HEADS + 1) if num_heads % count == 0)
    block = pl.BlockSpec((None, length, num_heads, width), lambda i, h, b: (b, 0, 0, 0))
    given = isinstance(positions, rotary.Tables)
    if given:
        sources = positions
        specs = [pl.BlockSpec((None, length, width), lambda i, h, b: (b, 0, 0))] * 2
    else:
        sources = positions.astype(jnp.int32), jnp.asarray(rotary.frequencies(width, theta))
        specs = [
            pl.BlockSpec((None, length), lambda i, h, b: (b, 0)),
            pl.BlockSpec((width // 2,), lambda i, h, b: (0,)),
        ]
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, given=given, inverse=inverse),
        grid=(pl.cdiv(length, ROWS), num_heads // heads, batch),
        in_specs=[*specs, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="rope_dhr",
    )(*sources, x)
