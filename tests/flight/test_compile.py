"""The step that is compiled ahead is the one that training runs."""

import dataclasses

import jax
import pytest

from tests.train import world
from vlmem_jax import sharding
from vlmem_jax.flight.compile import batch_shapes, train_job
from vlmem_jax.flight.program import KINDS, HloProgram
from vlmem_jax.models import VLM
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import NextToken

PARTS = ("vision", "decoder")


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


def test_the_step_compiles_without_data(settings):
    stage, mesh = settings.stages[-1], sharding.make_mesh(settings.mesh)
    step = train_job(settings, stage, mesh).lowered.compile()
    assert step.memory_analysis().alias_size_in_bytes > 0  # the state is donated


def test_collectives_do_not_grow_with_depth(settings):
    mesh, stage = sharding.make_mesh(settings.mesh), settings.stages[-1]

    def collectives(layers):
        deeper = {part: dataclasses.replace(getattr(settings.model, part), layers=layers) for part in PARTS}
        model = dataclasses.replace(settings.model, **deeper)
        job = train_job(dataclasses.replace(settings, model=model), stage, mesh)
        program = HloProgram(job.lowered.compile().as_text())
        return sum(i.opcode.removesuffix("-start") in KINDS for i, _ in program)

    assert collectives(8) == collectives(4) > 0
