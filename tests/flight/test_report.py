"""What the flight check says of memory, remedies and slices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.device import PEAKS
from tests.train import world
from vlmem_jax.flight.chips import CHIPS, Topology
from vlmem_jax.flight.memory import buffers, temporary_bytes
from vlmem_jax.flight.program import Collective, HloProgram
from vlmem_jax.flight.remedies import remedies
from vlmem_jax.flight.report import CAUSAL_KEYS, KERNEL_UTILISATION, activation_gathers, kernel_seconds
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.train.config import experiment

HLO = """HloModule jit_step

FileNames
1 "/usr/lib/python3/site-packages/jax/scan.py"
2 "/home/me/vlmem_jax/vlmem_jax/decoder/decoder.py"

FunctionNames
1 "scan"
2 "Decoder.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=155 end_line=155 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=0}
2 {file_location_id=1 parent_frame_id=2}


ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  %kept = bf16[4,8,4] fusion(%x), metadata={op_name="jit(step)/jvp(D)/while/body/dynamic_update_slice" stack_frame_id=2}
  %next = bf16[8,4] fusion(%kept), metadata={op_name="jit(step)/transpose(jvp(D))/while/body/add" stack_frame_id=1}
  ROOT %last = bf16[8,4] copy(%next)
}
"""

ASSIGNMENT = """BufferAssignment:
allocation 0: size 64, parameter 0, shape |bf16[8,4]| at ShapeIndex {}:
 value: <1 x @0> (size=64,offset=0): bf16[8,4]{1,0}
allocation 1: size 384, preallocated-temp:
 value: <2 kept{0} @0> (size=256,offset=0): bf16[4,8,4]{2,1,0:T(8,128)(2,1)}
 value: <3 next @0> (size=64,offset=256): bf16[8,4]{1,0}
 value: <4 unknown @0> (size=64,offset=320): bf16[8,4]{1,0}
 value: <5 last @0> (size=64,offset=64): bf16[8,4]{1,0}
allocation 2: size 128, color 1, preallocated-temp:
 value: <6 fast @0> (size=128,offset=0): bf16[8,8]{1,0:T(8,128)(2,1)S(1)}

Total bytes used: 576
"""


def test_buffers_have_their_size_and_their_line():
    found = buffers(ASSIGNMENT, HloProgram(HLO))
    assert temporary_bytes(ASSIGNMENT) == 384
    assert [(b.bytes, b.type, b.for_backward) for b in found] == [
        (256, "bf16[4,8,4]", True),
        (64, "bf16[8,4]", False),
        (64, "bf16[8,4]", False),
    ]
    assert {b.source for b in found} == {"vlmem_jax/decoder/decoder.py:155", ""}
    assert found[0].source, "the line is that of the package, not of the library that it calls"


def test_the_tables_of_a_real_program_are_read():
    from vlmem_jax.nn.attention import attend

    ones = jnp.ones((1, 4, 2, 8))
    program = HloProgram(jax.jit(lambda x: attend(x, x, x, None)).lower(ones).compile().as_text())
    sources = {program.source(instruction) for instruction, _ in program}
    assert any(source.startswith("kernels_pallas/memory_attention/reference.py:") for source in sources)


PARAMS = [(6, 1024, 2048)]


def gather(shape, axes=("fsdp",), devices=8, kind="all-gather"):
    size = 2 * int(jnp.prod(jnp.array(shape)))
    return Collective(kind, axes, shape, size, devices, 3, "jit(step)/dot_general")


def test_only_what_is_no_parameter_is_flagged():
    tensor = gather((16, 512, 512), ("tensor",), 4, "all-reduce")
    layer, stack, part = gather((1, 1024, 2048)), gather((6, 1024, 2048)), gather((1024, 512))
    activation, small = gather((16, 2048, 1024)), gather((16, 8))
    ring = gather((128, 2048), kind="collective-permute")
    found = [layer, stack, part, activation, small, tensor, ring]
    assert activation_gathers(found, PARAMS, {"fsdp": 8, "tensor": 4}) == [activation]
    assert activation_gathers(found, PARAMS, {"fsdp": 8, "tensor": 1}) == [part, activation]


KERNELS = """HloModule step

ENTRY %main (x: bf16[2,256,256]) -> f32[] {
  %m = (bf16[2,256,256], f32[2,2,1,256]) custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,256,256]{2,1,0}, bf16[2,512,256]{2,1,0}}, metadata={op_name="jit(step)/memory_attention_forward/pallas_call"}
  %b = bf16[2,256,256] custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[2,256,256]{2,1,0}, bf16[2,512,256]{2,1,0}, f32[2,2,2,256]{3,2,1,0}}, metadata={op_name="jit(step)/memory_attention_backward/pallas_call"}
  %s = bf16[4,256,128] custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,2]{1,0}, bf16[4,256,128]{2,1,0}, bf16[2,256,128]{2,1,0}}, metadata={op_name="jit(step)/splash_mha_fwd/pallas_call"}
  %c = bf16[2,4096,256] custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[2,256]{1,0}, s32[2,16]{1,0}, bf16[2,4096,256]{2,1,0}, bf16[2,4096,128]{2,1,0}}, metadata={op_name="jit(step)/causal_attention_forward/pallas_call"}
  %d = bf16[2,512,256] custom-call(%q), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]{0}, s32[2]{0}, s32[2]{0}, bf16[2,512,256]{2,1,0}, bf16[6,2,1,4096,128]{4,3,2,1,0}, bf16[6,2,1,4096,128]{4,3,2,1,0}, f32[2,512,128]{2,1,0}}, metadata={op_name="jit(step)/cached_attention/pallas_call"}
  %place = s32[8,256] custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(step)/splash_mha_fwd/squeeze"}
  ROOT %y = f32[] custom-call(%m), custom_call_target="Sharding"
}
"""  # noqa: E501 - lines of the compiler


def test_kernels_count_their_products():
    pairs = 2 * 256 * 512 * 2  # rows, queries, slots, heads; twice the heads where two share the 128 lanes
    causal = 4 * 256 * 256 / 2
    expected = 0.0
    for products, share, count in ((2, 0.95, pairs), (5, 0.97, 2 * pairs), (2, 0.88, causal)):
        expected += 2 * 128 * products * count / (PEAKS["v5p"].flops * share)
    packed = 2 * 2 * 4096  # rows, heads, tokens
    share = KERNEL_UTILISATION["causal_attention", "forward"]["v5p"] * PEAKS["v5p"].flops

    def of_pack(samples):
        return 2 * 2 * 128 * packed * (4096 // (2 * samples) + CAUSAL_KEYS["forward"]) / share

    chunk = 2 * 2 * 128 * 2 * 2 * 512 * 4096  # rows, heads, tokens, slots of a layer of the cache
    expected += chunk / (KERNEL_UTILISATION["cached_attention", "forward"]["v5p"] * PEAKS["v5p"].flops)
    expected += of_pack(1)

    def reading(bytes_a_second):
        return dataclasses.replace(CHIPS["v5p"], peak=dataclasses.replace(PEAKS["v5p"], hbm=bytes_a_second))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHIPS, "v5p", reading(1e18))  # in no time
        assert kernel_seconds(HloProgram(KERNELS), Topology("v5p:2x2x1")) == pytest.approx(expected)
        four = kernel_seconds(HloProgram(KERNELS), Topology("v5p:2x2x1"), samples=4)
        assert four == pytest.approx(expected - of_pack(1) + of_pack(4))
        patch.setitem(CHIPS, "v5p", reading(1e6))
        assert kernel_seconds(HloProgram(KERNELS), Topology("v5p:2x2x1")) > 100 * expected


@pytest.mark.parametrize(
    "kind, devices, seconds",
    [
        ("all-gather", 4, 0.75 / 2),  # one axis, two links
        ("all-reduce", 4, 2 * 0.75 / 2),
        ("all-gather", 64, 63 / 64 / 6),  # three axes
        ("all-gather", 1, 0.0),
    ],
)
def test_links(kind, devices, seconds):
    size = round(CHIPS["v5p"].link)
    assert Topology("v5p:4x4x4").seconds(kind, size, devices, ("fsdp",)) == pytest.approx(seconds)


def test_between_slices_only_data_takes_the_network():
    two = Topology("v5e:4x4", slices=2)
    assert two.chips == 32
    alone = Topology("v5e:4x4").seconds("all-gather", 10**9, 16, ("fsdp",))
    assert two.seconds("all-gather", 10**9, 16, ("fsdp",)) == alone
    assert two.seconds("all-reduce", 10**9, 2, ("data",)) == pytest.approx(10**9 / CHIPS["v5e"].network)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e:4x4x4", "there is no slice v5e:4x4x4; the nearest are v5e:8x8"),
        ("v5p:8x8", "there is no slice v5p:8x8; the nearest are v5p:4x4x4"),
    ],
)
def test_a_slice_that_does_not_exist_has_neighbours(name, message):
    with pytest.raises(ValueError, match=message):
        Topology(name)


@pytest.mark.parametrize("name", ["v5p", "v4:2x2", "v5e:2x", "v5e:0x2", "v5e:2xb"])
def test_what_is_no_topology_is_refused(name):
    with pytest.raises(ValueError, match="a topology is one of v5e, v5p, v6e"):
        Topology(name)


def test_remedies_are_settings_that_change_something(tmp_path):
    config = world.config(world.make(tmp_path), mesh=dict(data=2, fsdp=2, tensor=2))
    settings = experiment(config)
    stage, mesh = settings.stages[-1], make_mesh(settings.mesh)
    keys = [set(changes) for changes in remedies(settings, stage, mesh)]
    assert {"stages.finetune.accumulation"} in keys and {"mesh.data", "mesh.fsdp"} in keys
    assert {"model.remat"} in keys and {"mesh.context", "mesh.fsdp"} in keys
    assert {"mesh.tensor", "mesh.fsdp"} in keys
    one_row = dataclasses.replace(stage, accumulation=0)
    assert {"stages.finetune.accumulation"} not in [set(c) for c in remedies(settings, one_row, mesh)]
    alone = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    assert not any("mesh.tensor" in changes for changes in remedies(settings, stage, alone))
