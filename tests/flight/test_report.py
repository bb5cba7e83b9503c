"""What the flight check makes of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.program import Collective, HloProgram
from vlmem_jax.flight.report import activation_gathers, kernel_flops

PARAMS = {"layers": jax.ShapeDtypeStruct((6, 1024, 2048), jnp.float32)}


LINK = 90 * 10**9  # bytes a second of one link, one way


def gather(shape, axes=("fsdp",), devices=8, kind="all-gather"):
    size = 2 * int(jnp.prod(jnp.array(shape)))
    return Collective(kind, axes, shape, size, devices, 3, "jit(step)/dot_general")


def test_only_what_is_no_parameter_is_flagged():
    tensor = gather((16, 512, 512), ("tensor",), 4, "all-reduce")
    layer, stack, part = gather((1, 1024, 2048)), gather((6, 1024, 2048)), gather((1024, 512))
    activation, small = gather((16, 2048, 1024)), gather((16, 8))
    found = [layer, stack, part, activation, small, tensor]
    assert activation_gathers(found, PARAMS) == [activation]


KERNELS = """HloModule step

ENTRY %main (x: bf16[2,256,256]) -> f32[] {
  %m = bf16[2,256,256] custom-call(%q), operand_layout_constraints={bf16[2,256,256]{2,1,0}, bf16[2,512,256]{2,1,0}}, metadata={op_name="jit(step)/memory_attention_forward/pallas_call"}
  %b = bf16[2,256,256] custom-call(%q), operand_layout_constraints={bf16[2,256,256]{2,1,0}, bf16[2,512,256]{2,1,0}}, metadata={op_name="jit(step)/memory_attention_backward/pallas_call"}
  %s = bf16[4,256,128] custom-call(%q), operand_layout_constraints={s8[1,2]{1,0}, bf16[4,256,128]{2,1,0}, bf16[2,256,128]{2,1,0}}, metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}
  ROOT %y = f32[] custom-call(%m), custom_call_target="Sharding"
}
"""  # noqa: E501


def test_kernels_count_their_products():
    pairs = 2 * 256 * 512 * 2  # rows, queries, slots, heads
    causal = 4 * 256 * 256 / 2
    assert kernel_flops(HloProgram(KERNELS)) == 2 * 128 * (2 * pairs + 5 * pairs + 2 * causal)


@pytest.mark.parametrize(
    "kind, size, devices, seconds",
    [
        ("all-gather", LINK, 4, 0.75 / 2),  # one axis, two links of 90 GB/s
        ("all-reduce", LINK, 4, 2 * 0.75 / 2),
        ("all-gather", LINK, 64, 63 / 64 / 6),  # three axes
        ("all-gather", LINK, 1, 0.0),
    ],
)
def test_links(kind, size, devices, seconds):
    assert Topology("v5p:4x4x4").seconds(kind, size, devices) == pytest.approx(seconds)


@pytest.mark.parametrize("name", ["v5p", "v4:2x2", "v5e:2x", "v5e:0x2", "v5e:2xb"])
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(ValueError, match="a topology is one of v5e, v5p, v6e"):
        Topology(name)
