"""The step that is compiled ahead is the one that training runs."""

import jax
import pytest

from tests.train import world
from vlmem_jax import sharding
from vlmem_jax.flight.compile import batch_shapes, compile_step
from vlmem_jax.models import VLM
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import NextToken


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
    step = compile_step(settings, stage, mesh)
    assert step.memory_analysis().alias_size_in_bytes > 0  # the state is donated
