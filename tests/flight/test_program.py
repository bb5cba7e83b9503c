"""Collectives, and how often they run, read out of compiled programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmem_jax.flight.program import HloProgram, _groups
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

LAYERS = 5


def test_a_collective_in_a_loop_runs_as_often_as_the_loop():
    mesh = make_mesh(MeshConfig(fsdp=8))

    def shaped(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    def run(weights_LDD, x_BD):
        def layer(x_BD, w_DD):
            w_DD = jax.lax.with_sharding_constraint(w_DD, PartitionSpec())  # gathered before use
            return jax.lax.with_sharding_constraint(jnp.tanh(x_BD @ w_DD), PartitionSpec("fsdp", None)), None

        return jax.lax.scan(layer, x_BD, weights_LDD)[0]

    with jax.set_mesh(mesh):
        arguments = shaped((LAYERS, 64, 64), None, "fsdp", None), shaped((32, 64), "fsdp", None)
        program = HloProgram(jax.jit(run).lower(*arguments).compile().as_text())
    (gather,) = program.collectives(dict(mesh.shape))
    assert (gather.kind, gather.axes, gather.devices, gather.times) == ("all-gather", ("fsdp",), 8, LAYERS)
    assert gather.bytes == 64 * 64 * 4


HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%condition (state: (s32[], bf16[8,4])) -> pred[] {
  %state = (s32[], bf16[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %state = (s32[], bf16[8,4]) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %start = (bf16[8,4], bf16[16,4]) all-gather-start(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %done = bf16[16,4] all-gather-done(%start)
  %part = bf16[8,4] reduce-scatter(%done), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %kernel = bf16[8,4] custom-call(%part), frontend_attributes={kernel_metadata={
"block": "1"
}}, metadata={op_name="jit(step)/kernel"}
  %heavy = bf16[8,4] fusion(%kernel), kind=kLoop, calls=%inner, backend_config={"estimated_cycles":"100"}
  ROOT %next = (s32[], bf16[8,4]) tuple(%i, %heavy)
}

%inner (x: bf16[8,4]) -> bf16[8,4] {
  %x = bf16[8,4] parameter(0)
  ROOT %moved = bf16[8,4] collective-permute(%x), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
}

ENTRY %main (x: bf16[8,4]) -> f32[] {
  %x = bf16[8,4] parameter(0)
  %loop = (s32[], bf16[8,4]) while(%start), condition=%condition, body=%body
  %y = f32[] fusion(%loop), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"11"}
  ROOT %total = f32[] all-reduce(%y), replica_groups={}, to_apply=%add, metadata={op_name="jit(step)/sum"}
}
"""


def test_every_way_to_write_groups_and_loops():
    program = HloProgram(HLO)
    found = {c.kind: c for c in program.collectives({"data": 2, "fsdp": 2, "tensor": 2})}
    gathered, scattered, moved = found["all-gather"], found["reduce-scatter"], found["collective-permute"]
    assert (gathered.axes, gathered.shape, gathered.bytes, gathered.times) == (("data",), (16, 4), 128, 7)
    assert (scattered.axes, scattered.shape, scattered.times) == (("data",), (16, 4), 7)
    assert (moved.axes, moved.times) == (("tensor",), 7)
    total = found["all-reduce"]
    assert (total.axes, total.devices, total.times) == (("data", "fsdp", "tensor"), 8, 1)
    assert total.source == "jit(step)/sum"
    assert program.cycles() == 7 * 100 + 11


@pytest.mark.parametrize(
    "text, groups",
    [
        ("mesh['x'=2,'y'=4] {'x'}", [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        ("mesh['x'=2,'y'=4] {'y'}", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", [{0, 1}, {2, 3}, {4, 5}, {6, 7}]),
        ("mesh['x'=8] {'x':(2)2}", [{0, 2}, {1, 3}, {4, 6}, {5, 7}]),
        ("[2,4]<=[8]", [{0, 1, 2, 3}, {4, 5, 6, 7}]),
    ],
)
def test_groups_by_axes_of_the_compiler_s_own_mesh(text, groups):
    assert set(_groups(f"(%x), replica_groups={text}, to_apply=%add", 8)) == set(map(frozenset, groups))


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        HloProgram("module @jit_step {\n}\n")


def test_a_program_of_one_slice_names_the_groups_of_that_slice_alone():
    one = HLO.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups={{0,1},{2,3}}")
    found = {c.kind: c for c in HloProgram(one).collectives({"data": 2, "fsdp": 2, "tensor": 2})}
    assert found["reduce-scatter"].axes == ("tensor",)


def test_a_collective_of_single_devices_is_no_exchange():
    alone = HLO.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}")
    mesh = {"data": 2, "fsdp": 4}
    before, after = (HloProgram(text).collectives(mesh) for text in (HLO, alone))
    assert {c.kind for c in before} - {c.kind for c in after} == {"reduce-scatter"}


def test_an_attribute_may_contain_line_breaks():
    program = HloProgram(HLO)
    (kernel,) = (i for i, _ in program if i.opcode == "custom-call")
    assert kernel.operation == "jit(step)/kernel"


SLICES = """HloModule step

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4] parameter(0)
  %after = token[] after-all()
  %send = (f32[8,4], u32[], token[]) send(%x, %after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=3, is_host_transfer=true
  ROOT %y = f32[8,4] copy(%x)
}
"""  # noqa: E501 - lines of the compiler


def test_what_goes_between_slices_is_sent_by_hosts():
    (sent,) = HloProgram(SLICES).collectives({"data": 3, "fsdp": 8})
    assert (sent.kind, sent.axes, sent.bytes, sent.devices, sent.times) == ("all-reduce", ("data",), 128, 3, 1)


SCATTER = """HloModule step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter (gradient: bf16[16,8]) -> bf16[5,8] {
  %gradient = bf16[16,8] parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[20,8] pad(%gradient, %zero), padding=0_4x0_0
  %all-reduce = bf16[20,8] all-reduce(%pad), replica_groups={{0,1,2,3}}, to_apply=%add
  %first = u32[] constant(5)
  ROOT %part = bf16[5,8] dynamic-slice(%all-reduce, %first, %first), dynamic_slice_sizes={5,8}
}

%start (w: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %w = bf16[2,8] parameter(0)
  %gather.1 = bf16[8,8] all-gather(%w), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %started = (bf16[2,8], bf16[8,8]) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (w.1: bf16[2,8]) -> bf16[8,8] {
  %w.1 = bf16[2,8] parameter(0)
  %gather.2 = bf16[8,8] all-gather(%w.1), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %ended = bf16[8,8] custom-call(%w.1, %gather.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[16,8], w.2: bf16[2,8]) -> bf16[5,8] {
  %x = bf16[16,8] parameter(0)
  %w.2 = bf16[2,8] parameter(1)
  %begun = (bf16[2,8], bf16[8,8]) fusion(%w.2), kind=kOutput, calls=%start
  %whole = bf16[8,8] fusion(%w.2), kind=kOutput, calls=%done
  %scattered = bf16[5,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(step)/dot_general"}
  %edge = bf16[1,8] slice(%scattered), slice={[4:5], [0:8]}
  %moved = bf16[1,8] collective-permute(%edge), source_target_pairs={{0,1},{1,2},{2,3}}
  ROOT %y = bf16[5,8] copy(%scattered)
}
"""  # noqa: E501 - lines of the compiler


def test_an_array_is_known_though_the_compiler_pads_it_to_scatter_it():
    found = {c.kind: c for c in HloProgram(SCATTER).collectives({"fsdp": 4})}
    scattered, edge = found["reduce-scatter"], found["collective-permute"]
    assert (scattered.axes, scattered.shape, scattered.bytes, scattered.times) == (("fsdp",), (16, 8), 256, 1)
    assert scattered.source == "jit(step)/dot_general"
    assert (edge.axes, edge.shape, edge.bytes) == (("fsdp",), (16, 8), 16)  # what it moves belongs to the same array
    assert "all-reduce" not in found


def test_an_exchange_in_several_steps_counts_once():
    found = {c.kind: c for c in HloProgram(SCATTER).collectives({"fsdp": 4})}
    assert (found["all-gather"].shape, found["all-gather"].times) == ((8, 8), 1)


MOVED = """HloModule step

%turned (bank: bf16[2,64,8]) -> bf16[2,8,64] {
  %bank = bf16[2,64,8] parameter(0)
  ROOT %turn = bf16[2,8,64] transpose(%bank), dimensions={0,2,1}
}

%summed (bank: bf16[2,64,8]) -> bf16[2,64,8] {
  %bank.1 = bf16[2,64,8] parameter(0)
  ROOT %sum = bf16[2,64,8] add(%bank.1, %bank.1)
}

%body (state: (s32[], bf16[2,64,8])) -> (s32[], bf16[2,64,8]) {
  %state = (s32[], bf16[2,64,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %whole = bf16[2,64,8] get-tuple-element(%state), index=1
  %again = bf16[2,64,8] copy(%whole)
  ROOT %next = (s32[], bf16[2,64,8]) tuple(%i, %again)
}

ENTRY %main (bank: bf16[2,64,8], frame: bf16[2,4,8]) -> bf16[2,64,8] {
  %kept = bf16[2,64,8] parameter(0)
  %frame = bf16[2,4,8] parameter(1)
  %n = s32[] constant(0)
  %ahead = bf16[2,64,8]{2,1,0:S(1)} copy(%kept)
  %padded = bf16[2,128,8] pad(%kept, %n), padding=0_0x0_64x0_0
  %half = bf16[1,64,8] slice(%kept), slice={[0:1], [0:64], [0:8]}
  %one = bf16[2,4,8] slice(%kept), slice={[0:2], [0:4], [0:8]}
  %small = bf16[2,4,8] copy(%frame)
  %turned.1 = bf16[2,8,64] fusion(%kept), kind=kLoop, calls=%turned
  %summed.1 = bf16[2,64,8] fusion(%kept), kind=kLoop, calls=%summed
  %begun = (s32[], bf16[2,64,8]) tuple(%n, %kept)
  %loop = (s32[], bf16[2,64,8]) while(%begun), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %written = bf16[2,64,8] dynamic-update-slice(%kept, %frame, %n, %n, %n)
}
"""  # noqa: E501 - lines of the compiler


def test_copies_of_large_arrays_are_counted():
    """Padded, cut in half, turned round, and copied three times; what is computed, small or in fast memory is none."""
    assert HloProgram(MOVED).copies({2 * 64 * 8}) == 3 + 3
    assert HloProgram(MOVED).copies({7}) == 0
