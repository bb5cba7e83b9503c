"""The time of a program by its products and its traffic with memory."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.device import Peak
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.flight.roofline import PRODUCTS, seconds

PRODUCTS_ALONE, MEMORY_ALONE = Peak(flops=1 / PRODUCTS, hbm=float("inf")), Peak(flops=float("inf"), hbm=1.0)

HLO = """HloModule step

%part (stack: f32[6,8,4], n: s32[]) -> f32[8,4] {
  %stack = f32[6,8,4] parameter(0)
  %n = s32[] parameter(1)
  %slice = f32[1,8,4] dynamic-slice(%stack, %n, %n, %n), dynamic_slice_sizes={1,8,4}
  ROOT %layer = f32[8,4] bitcast(%slice)
}

%put (stack: f32[6,8,4], x: f32[8,4], n: s32[]) -> f32[6,8,4] {
  %whole = f32[6,8,4] parameter(0)
  %x = f32[8,4] parameter(1)
  %n = s32[] parameter(2)
  %wide = f32[1,8,4] bitcast(%x)
  ROOT %updated = f32[6,8,4] dynamic-update-slice(%whole, %wide, %n, %n, %n)
}

ENTRY %main (stack: f32[6,8,4], near: f32[8,4], n: s32[]) -> f32[6,8,4] {
  %stack = f32[6,8,4] parameter(0)
  %near = f32[8,4]{1,0:T(8,128)S(1)} parameter(1)
  %n = s32[]{:S(1)} parameter(2)
  %begun = (f32[8,4], f32[8,4], u32[]) copy-start(%near)
  %layer = f32[8,4] fusion(%stack, %n), kind=kLoop, calls=%part
  %sum = f32[8,4] add(%layer, %near)
  ROOT %new = f32[6,8,4] fusion(%stack, %sum, %n), kind=kLoop, calls=%put
}
"""


@pytest.mark.parametrize(
    "operation, shapes, flops",
    [
        (lambda x, y: x @ y, [(8, 32), (32, 16)], 2 * 8 * 32 * 16),
        (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), [(3, 8, 32), (3, 32, 16)], 3 * 2 * 8 * 32 * 16),
        (lambda x, y: jax.lax.scan(lambda x, w: (x @ w, None), x, y)[0], [(8, 16), (5, 16, 16)], 5 * 2 * 8 * 16 * 16),
        # of 10 places and 3 taps, a tap of the first and one of the last place lie outside
        (lambda x, y: jax.lax.conv(x, y, (1,), "SAME"), [(2, 4, 10), (6, 4, 3)], 2 * 2 * 4 * 6 * (10 * 3 - 2)),
    ],
)
def test_products_are_counted_whatever_holds_them(operation, shapes, flops):
    program = jax.jit(operation).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    assert seconds(HloProgram(program.as_text()), PRODUCTS_ALONE) == pytest.approx(flops)


def test_slices_updates_and_fast_memory_cost_what_goes_through_the_large_one():
    layer = 8 * 4 * 4
    # the slice is read and written, read and the sum written, read and put into its place; `near` costs nothing
    assert seconds(HloProgram(HLO), MEMORY_ALONE) == (1 + 1) * layer + (1 + 1) * layer + (1 + 1) * layer


def test_a_slice_within_a_fusion_within_a_fusion_costs_no_more():
    within = """%doubled (stack: f32[6,8,4], n: s32[]) -> f32[8,4] {
  %stack = f32[6,8,4] parameter(0)
  %n = s32[] parameter(1)
  %inner = f32[8,4] fusion(%stack, %n), kind=kLoop, calls=%part
  ROOT %twice = f32[8,4] add(%inner, %inner)
}

ENTRY"""
    nested = HLO.replace("ENTRY", within).replace(
        "kind=kLoop, calls=%part\n  %sum", "kind=kLoop, calls=%doubled\n  %sum"
    )
    assert nested.count("calls=%doubled") == 1
    assert seconds(HloProgram(nested), MEMORY_ALONE) == seconds(HloProgram(HLO), MEMORY_ALONE)
