"""TPU kernel of the rotation: a grid step turns some rows of all heads, so that angles are made once for them."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary

LANES = 128
ROWS = 256


def unsupported(x: jax.Array) -> str | None:
    """Why the kernel cannot serve, or None."""
    if x.shape[-1] != LANES:
        return f"head dim must be {LANES}, got {x.shape[-1]}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, got {x.dtype}"
    return None


def _kernel(*refs, heads: int, given: bool, inverse: bool):
    *made_of, x_ref, o_ref = refs
    if given:
        cos, sin = made_of[0][...], made_of[1][...]
    else:
        row, angles = made_of
        cos, sin = rotary.tables_in_kernel(jnp.broadcast_to(row[...], (LANES, row.shape[1])).T, angles[...])
    for h in range(heads):
        lanes = pl.ds(h * LANES, LANES)
        o_ref[:, lanes] = rotary.turned(x_ref[:, lanes], cos, sin, inverse=inverse).astype(o_ref.dtype)


def turn(
    x: jax.Array, positions: jax.Array | rotary.Tables, *, theta: float, inverse: bool, interpret: bool = False
) -> jax.Array:
    """x [B, T, H, 128] turned, or turned back."""
    batch, length, heads, width = x.shape
    rows = min(ROWS, -(-length // LANES) * LANES)
    padded = -(-length // rows) * rows
    more = padded - length
    flat = jnp.pad(x.reshape(batch, length, heads * width), ((0, 0), (0, more), (0, 0)))
    block = pl.BlockSpec((None, rows, heads * width), lambda b, i: (b, i, 0))
    given = isinstance(positions, rotary.Tables)
    if given:
        sources = [jnp.pad(t, ((0, 0), (0, more), (0, 0))) for t in positions]
        specs = [pl.BlockSpec((None, rows, width), lambda b, i: (b, i, 0))] * 2
    else:
        row = jnp.pad(positions.astype(jnp.int32), ((0, 0), (0, more)))[:, None]
        sources = [row, jnp.asarray(rotary.angle_row(width, width, theta))]
        specs = [
            pl.BlockSpec((None, 1, rows), lambda b, i: (b, 0, i)),
            pl.BlockSpec((1, width), lambda b, i: (0, 0)),
        ]
    turned = pl.pallas_call(
        functools.partial(_kernel, heads=heads, given=given, inverse=inverse),
        grid=(batch, padded // rows),
        in_specs=[*specs, block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 * 2**20),
        interpret=interpret,
        name="rope_dhr",
    )(*sources, flat)
    return turned[:, :length].reshape(x.shape)
