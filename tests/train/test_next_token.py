"""Training the real model: stages, meshes, and what the compiled step does."""

import math

import jax
import numpy as np
import pytest

from tests.train import world
from vlmem_jax.checkpoint import load_params
from vlmem_jax.config import override
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.models import VLM
from vlmem_jax.runtime import sharding
from vlmem_jax.train.config import experiment
from vlmem_jax.train.loop import Program
from vlmem_jax.train.next_token import NextToken
from vlmem_jax.train.run import origin, run
from vlmem_jax.trees import flatten

GATES = {"memory/blocks/attn_gate", "memory/blocks/mlp_gate"}
ALL = dict(name="all", steps=4, learning_rate=1e-2)
"""A stage that trains everything."""
MIXED = (2, 2, 1, 2)
"""Sizes of a mesh, in the order of its axes: data, fsdp, context, tensor."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


def settings(folder, shape, *stages):
    mesh = dict(zip(sharding.MESH_AXES, shape, strict=True))
    return experiment(world.config(folder, stages=[ALL, *stages], mesh=mesh))


@pytest.fixture(scope="module")
def trained(folder):
    """The workdir of two stages: one of everything, and one of what is new without its gates."""
    new = dict(trainable=["projector/", "memory/"], frozen=["memory/blocks/.*_gate"])
    stages = dict(name="gates_frozen", steps=2, learning_rate=1e-2, **new)
    assert run(settings(folder, MIXED, stages), folder / "run")
    return folder / "run"


def params(folder, stage, step):
    model = VLM(experiment(world.config(folder)).model)
    return flatten(load_params(folder / "run" / stage / str(step), model.abstract()))


def changed(before, after):
    return {path for path in before if np.any(np.asarray(before[path]) != np.asarray(after[path]))}


def test_each_stage_changes_what_it_trains_and_nothing_else(folder, trained):
    early, late = params(folder, "all", 2), params(folder, "all", 4)
    assert changed(early, late) == set(early)
    new = {path for path in early if path.startswith(("projector/", "memory/"))}
    assert changed(late, params(folder, "gates_frozen", 2)) == new - GATES


def test_frozen_parameters_have_no_optimizer_state(trained):
    stored = (trained / "gates_frozen" / "2" / "train" / "_METADATA").read_text()
    assert "memory" in stored and "projector" in stored
    assert not any(name in stored for name in ("_gate", "decoder", "vision"))


def test_gates_and_fill_are_recorded(trained):
    last = [line for line in (trained / "metrics.jsonl").read_text().splitlines() if '"all", "step": 4' in line]
    assert '"gate/attn/1": ' in last[0] and '"fill": ' in last[0]
    assert '"eval/loss": ' in last[1]


@pytest.fixture(scope="module")
def start(folder):
    """Gives the parameters of the first step where a program wants them; they are drawn once."""
    one = settings(folder, (1, 1, 1, 1))
    model = VLM(one.model)
    begin, _ = origin(one, one.stages[0], model, folder / "none")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = begin(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), model.abstract()))
    return lambda target: jax.tree.map(lambda x, t: jax.device_put(np.asarray(x), t.sharding), drawn, target)


@pytest.fixture(scope="module")
def steps_on(folder, start):
    """`steps_on(data, fsdp, context, tensor)`: the program of `ALL` on that mesh, its step, the losses of all steps."""

    def train(*sizes):
        whole = settings(folder, sizes)
        stage, mesh = whole.stages[0], sharding.make_mesh(whole.mesh, jax.devices()[: math.prod(sizes)])
        with jax.set_mesh(mesh):
            task = NextToken(whole, stage, VLM(whole.model), mesh)
            program = Program(task, whole, stage, mesh)
            work = [task.work(step, {}) for step in range(stage.steps)]
            task.close()
            state, frozen = program.begin(start)
            step = program.step.lower(state, frozen, work[0].batch, jax.ShapeDtypeStruct((), np.float32)).compile()
            losses = []
            for part in work:
                state, metrics = step(state, frozen, part.batch, np.float32(part.denominator))
                losses.append(float(metrics["loss"]))
        return program, step, losses

    return train


@pytest.fixture(scope="module")
def one_device(steps_on):
    return steps_on(1, 1, 1, 1)[2]


@pytest.fixture(scope="module", params=[(1, 8, 1, 1), MIXED, (1, 2, 2, 2)], ids=["fsdp", "mixed", "context"])
def compiled(request, steps_on):
    return steps_on(*request.param)


def test_every_mesh_gives_the_losses_of_one_device(compiled, one_device):
    assert one_device[-1] < one_device[0]
    np.testing.assert_allclose(compiled[2], one_device, rtol=1e-5)


def test_the_loop_gives_them_too(trained, one_device):
    found = [loss for (stage, _), loss in world.losses(trained).items() if stage == "all"]
    np.testing.assert_allclose(found, one_device, rtol=1e-5)


def test_the_step_gathers_parameters_and_no_activations(compiled):
    program, step, _ = compiled
    sizes = {leaf.shape[-n:] for leaf in jax.tree.leaves(program.held) for n in range(1, leaf.ndim + 1)}
    largest = max(int(np.prod(shape)) for shape in sizes)
    found = HloProgram(step.as_text()).collectives(dict(program.replicated.mesh.shape))
    gathered = {c.shape for c in found if c.kind == "all-gather" and c.axes != ("context",)}  # where rows are joined
    assert gathered
    for shape in gathered:
        assert math.prod(shape) <= largest and 96 not in shape, f"{shape} is no parameter"
    stacked = {leaf.shape for path, leaf in program.held.items() if "/layers/" in path and leaf.ndim >= 3}
    assert not stacked & gathered, "layers are gathered singly"


def test_the_old_state_makes_room_for_the_new(compiled):
    program, step, _ = compiled
    held = sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(program.state))
    assert step.memory_analysis().alias_size_in_bytes == held


def test_bf16_keeps_frozen_matrices_in_bf16_and_trains_in_fp32(folder):
    config = override(world.config(folder), {"model.compute_dtype": "bfloat16"})
    settings = experiment(config)
    mesh = sharding.make_mesh(settings.mesh)
    with jax.set_mesh(mesh):
        task = NextToken(settings, settings.stages[1], VLM(settings.model), mesh)
        program = Program(task, settings, settings.stages[1], mesh)
    dtypes = {path: leaf.dtype.name for path, leaf in program.held.items()}
    assert dtypes["decoder/layers/attn/q/kernel"] == "bfloat16"
    assert dtypes["decoder/norm/scale"] == dtypes["memory/blocks/attn_gate"] == "float32"
    assert dtypes["projector/mlp/fc1/kernel"] == "float32"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image.size": 8}, "config.image.size is no key any more: a tile has the size of model.vision.image_size"),
        ({"model.decoder.vocab": 100}, "set model.decoder.vocab=104 or more"),
        ({"data.rows": 4}, "must divide the 4 rows of a batch"),
        ({"tokenizer": "nowhere"}, "there is no folder 'nowhere'"),
        ({"stages.pretrain.task": "patches"}, "stages.pretrain.task.kind must be one of next_token; got 'patches'"),
        ({"stages.pretrain.trainable": ["visoin"]}, "stages.pretrain trains nothing"),
        ({"init": "nowhere"}, "there is no folder .*nowhere"),
    ],
)
def test_what_does_not_fit_is_said(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(experiment(override(world.config(folder), changes)), tmp_path / "run")
