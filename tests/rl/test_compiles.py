"""What is compiled for a stage: all of it in the first step, whatever is drawn after it."""

import jax
import pytest

from tests.rl import memory_world, world
from vlmem_jax.config import override
from vlmem_jax.rl import GRPO, MemorySFT
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.train.config import experiment

EVENT = "/jax/core/compile/backend_compile_duration"
SMALL = {"data.rows": 1, "data.eval": [], "eval_every": 100, "checkpoint.every": 100, "model.decoder.layers": 1}
UPDATE = {f"jit({name})" for name in ("nothing", "accumulate", "apply", "by_reference")}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture
def trained(monkeypatch, tmp_path, mesh):
    """`trained(task, config)`: how many parts each step had, and what was compiled in the first step and after it."""
    names = []

    def listen(event, seconds, **kwargs):
        if event == EVENT:
            names.append(kwargs["fun_name"])

    def train(task, config):
        parts, before, work = [], [], task.work

        def counting(self, step, params):
            before.append(len(names))
            found = work(self, step, params)
            parts.append(len(found.batch))
            return found

        monkeypatch.setattr(task, "work", counting)
        world.train(experiment(override(config, SMALL)), tmp_path / "run", mesh, task=task)
        return parts, names[: before[1]], names[before[1] :]

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield train
    jax.monitoring.unregister_event_duration_listener(listen)


def test_whatever_is_drawn_nothing_is_compiled_after_the_first_step(tmp_path, trained):
    keys = dict(play="tests.rl.own_plays:MadeUp", max_new_tokens=40, adaptive_kl=True)
    config = world.config(world.make(tmp_path), keys)
    config.stages[0] |= {"steps": 6}
    parts, first, later = trained(GRPO, override(config, {"model.memory": "none", "model.vision.layers": 1}))
    assert len(set(parts)) > 1, "steps fill another number of parts"
    assert set(first) >= UPDATE and later == []


def test_nor_is_it_where_memories_are_formed(tmp_path, trained):
    config = memory_world.config(tmp_path)
    stage = config.stages[0]
    task = stage["task"] | dict(play="tests.rl.own_plays:MadeUp", max_new_tokens=30)
    config.stages = [stage | dict(steps=5, task=task)]
    parts, first, later = trained(GRPO, config)
    assert len(set(parts)) > 1 and set(first) >= UPDATE and later == []


@pytest.mark.slow
def test_the_update_of_a_warm_up_is_compiled_once(tmp_path, trained):
    config = memory_world.config(tmp_path)
    config.stages = [config.stages[0] | dict(steps=4, task=dict(kind="memory_sft", prompts=3, row_memories=2))]
    parts, first, later = trained(MemorySFT, config)
    assert parts and UPDATE - {"jit(by_reference)"} <= set(first) and not UPDATE & set(later)
