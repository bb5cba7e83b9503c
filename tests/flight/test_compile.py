"""The step that is compiled ahead is the one that training runs."""

import dataclasses
import tempfile
from concurrent.futures import Future
from pathlib import Path

import jax
import pytest

from tests.train import world
from vlmem_jax.flight import compile as compile_module
from vlmem_jax.flight.compile import (
    LAST_WRITTEN,
    Job,
    Serving,
    batch_shapes,
    compile_job,
    decode_job,
    prefill_job,
    train_job,
)
from vlmem_jax.flight.program import KINDS, HloProgram
from vlmem_jax.models import VLM
from vlmem_jax.runtime import sharding
from vlmem_jax.runtime.compiler import OPTIONS
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import NextToken

PARTS = ("vision", "decoder")
SERVING = Serving(rows=8, tokens=64, tiles=2, new_tokens=8)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = world.make(tmp_path_factory.mktemp("world"))
    return experiment(world.config(folder, mesh=dict(data=2, fsdp=2, tensor=2)))


def test_the_shapes_are_those_of_a_real_batch(settings):
    stage, mesh = settings.stages[-1], sharding.make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        task = NextToken(settings, stage, VLM(settings.model), mesh)
        batch = task.work(0, {}).batch
        task.close()
    describe = lambda x: (x.shape, x.dtype, x.sharding.spec, x.sharding.mesh)  # noqa: E731
    assert jax.tree.map(describe, batch) == jax.tree.map(describe, batch_shapes(settings, stage, mesh))


def step(settings, layers):
    """The compiled step of a model of so many layers, of its vision tower and of its decoder."""
    mesh, stage = sharding.make_mesh(settings.mesh), settings.stages[-1]
    deeper = {part: dataclasses.replace(getattr(settings.model, part), layers=layers) for part in PARTS}
    model = dataclasses.replace(settings.model, **deeper)
    return train_job(dataclasses.replace(settings, model=model), stage, mesh).lowered.compile()


@pytest.fixture(scope="module")
def four_layers(settings):
    return step(settings, 4)


def test_the_step_compiles_without_data(four_layers):
    assert four_layers.memory_analysis().alias_size_in_bytes > 0  # the state is donated


def test_serving_is_compiled_as_generation_compiles_it(settings, monkeypatch):
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_no_such_option": True})
    mesh = sharding.make_mesh(settings.mesh)
    for make in (prefill_job, decode_job):
        with pytest.raises(ValueError, match="xla_no_such_option"):
            compile_job(make(settings, SERVING, mesh))


def test_a_step_leaves_rows_where_it_finds_them(settings):
    """All caches are full in what is counted, and none of them is copied."""
    mesh = sharding.make_mesh(settings.mesh)
    job = decode_job(settings, SERVING, mesh)
    program = job.lowered.compile()
    for x, place in zip(job.carried, jax.tree.leaves(program.output_shardings[0]), strict=True):
        assert x.size == 0 or x.sharding.is_equivalent_to(place, x.ndim)
    assert program.memory_analysis().alias_size_in_bytes == job.state


def test_collectives_do_not_grow_with_depth(settings, four_layers):
    def collectives(compiled):
        return sum(i.opcode.removesuffix("-start") in KINDS for i, _ in HloProgram(compiled.as_text()))

    assert collectives(step(settings, 8)) == collectives(four_layers) > 0


class Compiling(jax.stages.Lowered):
    """A program whose compiler describes it, then writes machine code until it is told how that ends."""

    def __init__(self, *described):
        self.described = described
        self.end = Future()

    def compile(self, compiler_options):
        for kind in self.described:
            Path(compiler_options["xla_dump_to"], f"module.{kind}").write_text(TEXTS.get(kind, ""))
        return self.end.result(60)


TEXTS = {
    "after_optimizations.txt": "HloModule m\n\nENTRY %main (x: s8[8]) -> s8[8] {\n  ROOT %x = s8[8] parameter(0)\n}\n",
    "buffer-assignment.txt": "allocation 0: size 8, parameter 0\nallocation 1: size 24, preallocated-temp:\n",
}


class Written:
    """A program with its machine code."""

    def as_text(self):
        return TEXTS["after_optimizations.txt"].replace("parameter(0)", 'parameter(0), x={"estimated_cycles":"5"}')


FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")


def test_the_answer_does_not_wait_for_machine_code():
    program = Compiling(*TEXTS, LAST_WRITTEN)
    answer, code = compile_job(Job(program, parameters=8, state=0, inputs=0))
    assert not code.done() and answer.fits
    assert (answer.temporary, answer.peak) == (24, 32)
    program.end.set_result(Written())
    assert code.result(60).cycles() == 5


def test_a_kernel_without_machine_code_is_refused():
    program = Compiling(*TEXTS, LAST_WRITTEN)
    _, code = compile_job(Job(program, 8, 0, 0))
    program.end.set_exception(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: in memory space vmem"))
    with pytest.raises(ValueError, match="the compiler refuses the program: .*vmem"):
        code.result(60)


def test_what_does_not_fit_is_described():
    program = Compiling(*TEXTS)
    program.end.set_exception(FULL)
    answer, code = compile_job(Job(program, 8, 0, 0))
    assert not answer.fits and answer.peak == 32 and code.result() is None


def test_an_interrupted_compile_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(_):
        assert list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compile_module.time, "sleep", interrupt)
    program = Compiling()
    with pytest.raises(KeyboardInterrupt):
        compile_job(Job(program, 8, 0, 0))
    program.end.set_exception(FULL)
    assert not list(tmp_path.iterdir())
