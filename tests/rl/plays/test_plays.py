"""Plays of more than one step an episode: of turns of text, and of decisions among labels."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drawn import random_params
from tests.rl import own, own_plays, world
from tests.rl.packed import stacked
from vlmem_jax.config import ConfigError, override
from vlmem_jax.generate.score import label_logp
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPO
from vlmem_jax.runtime import sharding
from vlmem_jax.train.config import experiment

PLAYS = ["Decisions", "TwoTurns"]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """An Experiment of prompts of text, by the name of its play; a phase is two steps."""
    folder = world.make(tmp_path_factory.mktemp("world"))
    lines = (json.dumps({"prompt": f"Say {'ab'[n % 2]} {n}", "answer": "b"}) + "\n" for n in range(6))
    (folder / "text.jsonl").write_text("".join(lines))

    def make(play, **task):
        keys = {
            "model.memory": "none", "model.decoder.layers": 1, "model.vision.layers": 1, "checkpoint.every": 100,
            "eval_every": 100, "data.train.0.path": str(folder / "text.jsonl"), "data.eval": [],
            "stages.rl.learning_rate": 3e-2, "stages.rl.task.play": play, "stages.rl.task.drop_zero_variance": False,
        }  # fmt: skip
        return experiment(override(world.config(folder), keys | {f"stages.rl.task.{k}": v for k, v in task.items()}))

    return make


@pytest.mark.parametrize("name", PLAYS)
def test_each_step_of_an_episode_teaches_by_its_share(settings, mesh, name):
    """And the trainer finds the probabilities that steps were drawn with, of labels among each other."""
    config = settings(f"tests.rl.own_plays:{name}")
    task = GRPO(config, config.stages[0], VLM(config.model), mesh)
    with jax.set_mesh(mesh):
        places = sharding.param_shardings(mesh, task.model.abstract(), task.model.axes())
        params = jax.device_put(random_params(task.model), places)
        work = task.work(0, params)
        rows = stacked(work.batch)
        scored = jax.jit(lambda params, batch: jax.lax.map(lambda part: task.log_probs(params, part), batch))
        logp_BT = np.asarray(scored(params, rows.batch))
    task.close()
    count = getattr(own_plays, name).count
    lessons = task._phases.lessons
    assert len(lessons) == 8 == pytest.approx(work.denominator) and all(
        len(lesson.steps) == count for lesson in lessons
    )
    text = rows.batch.text
    np.testing.assert_allclose(np.sum(text.weights_BT), 8, rtol=1e-5)
    counts_BT = np.asarray(text.weights_BT > 0)
    np.testing.assert_allclose(logp_BT[counts_BT], np.asarray(rows.old_logp_BT)[counts_BT], atol=1e-5)
    for lesson in lessons:
        first, second = lesson.steps[:2]
        shared = len(first.prompt.tokens_T) + len(first.tokens_T)
        assert second.prompt.tokens_T[:shared].tolist() == [*first.prompt.tokens_T, *first.tokens_T]


def test_kl_of_decisions_may_be_that_of_all_labels(settings, mesh):
    """Here of a policy whose reference finds all of them equally likely."""
    config = settings("tests.rl.own_plays:Decisions", kl=0.5, kl_of="labels", reference="tests.rl.own:never")
    task = GRPO(config, config.stages[0], VLM(config.model), mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(
            random_params(task.model), sharding.param_shardings(mesh, task.model.abstract(), task.model.axes())
        )
        rows = task.work(0, params).batch[0]
        _, sums = jax.jit(lambda params, rows: task.loss(params, rows, None))(params, rows)
        labels_K, kept_K = jnp.array(task.labels), jnp.ones(len(task.labels), bool)
        logp_BTK, ref_BTK = (
            label_logp(task.model, of, rows.batch, labels_K, kept_K) for of in (params, own.never(params))
        )
    task.close()
    weights_BT = rows.batch.text.weights_BT
    expected = (weights_BT[..., None] * jnp.exp(logp_BTK) * (logp_BTK - ref_BTK)).sum()
    assert sums["kl"] == pytest.approx(float(expected), rel=1e-4) and expected > 1e-3


def test_kl_of_labels_is_refused_where_tokens_are_drawn(settings, mesh):
    config = settings("tests.rl.own_plays:TwoTurns", kl_of="labels")
    with pytest.raises(ConfigError, match="task.kl_of=labels is for plays whose steps are drawn among labels"):
        GRPO(config, config.stages[0], VLM(config.model), mesh)


def test_decisions_are_learned(settings, mesh, tmp_path):
    config = settings("tests.rl.own_plays:Decisions", kl=0.0)
    world.train(config, tmp_path, mesh)
    lines = world.numbers(tmp_path)
    assert lines[0]["ratio"] == pytest.approx(1, abs=1e-5) and lines[-1]["score/mean"] > lines[0]["score/mean"] + 0.2


@pytest.mark.parametrize("name", PLAYS)
def test_a_run_stopped_in_midst_of_a_phase_makes_the_prompts_of_its_steps_again(settings, mesh, tmp_path, name):
    config = settings(f"tests.rl.own_plays:{name}", minibatches=2)
    world.train(config, tmp_path / "whole", mesh)
    for stop in (0, 2, None):
        world.train(config, tmp_path / "parts", mesh, until=stop)
    assert world.numbers(tmp_path / "parts") == world.numbers(tmp_path / "whole")


@pytest.mark.parametrize(
    "play, message",
    [
        ("Decisions", "play must be MODULE:FUNCTION, got 'Decisions'"),
        ("tests.rl.own_plays:None_such", "stages.rl.task.play 'tests.rl.own_plays:None_such' must be MODULE:FUNCTION"),
    ],
)
def test_a_play_that_there_is_not_is_named(settings, play, message):
    with pytest.raises(ConfigError, match=message):
        config = settings(play)
        GRPO.check(config, config.stages[0])
