"""GRPO in the training loop: it learns, goes on where it stopped, and says what does not fit."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from tests.drawn import random_params
from tests.rl import world
from tests.rl.packed import stacked
from tests.train import world as supervised
from vlmem_jax import rl
from vlmem_jax.checkpoint import load_params
from vlmem_jax.checkpoint.folder import committed_steps
from vlmem_jax.config import ConfigError, override
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPO, rollout
from vlmem_jax.runtime import sharding
from vlmem_jax.train import run as runs
from vlmem_jax.train.config import experiment

STAGE = "stages.rl"
SMALL = {
    "model.memory": "none", "model.decoder.layers": 1, "model.vision.layers": 1, "model.vision.drop_path": 0.0,
    "checkpoint.every": 100, "eval_every": 100,
}  # fmt: skip
"""A model that compiles fast."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def settings(folder):
    """An Experiment from keys that differ; the prompts are text alone."""
    text = "".join(json.dumps({"prompt": f"Say {'ab'[n % 2]} {n}", "answer": "b"}) + "\n" for n in range(6))
    (folder / "text.jsonl").write_text(text)

    def make(**changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        own = {"data.train.0.path": str(folder / "text.jsonl"), "data.eval": [], "stages.rl.learning_rate": 3e-2}
        return experiment(override(world.config(folder), {**SMALL, **own, **changes}))

    return make


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def params(folder, mesh):
    """The parameters of the model that compiles fast, laid out where a run has its own."""
    model = VLM(experiment(override(world.config(folder), SMALL)).model)
    places = sharding.param_shardings(mesh, model.abstract(), model.axes())
    return jax.device_put(random_params(model), places)


def make_task(settings, mesh, workdir="."):
    return GRPO(settings, settings.stages[0], VLM(settings.model), mesh, workdir)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_a_trivial_reward_is_learned(settings, mesh, tmp_path):
    world.train(settings(stages__rl__steps=20, stages__rl__task__drop_zero_variance=False), tmp_path, mesh)
    lines = records(tmp_path)
    scores = [line["score/mean"] for line in lines]
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.3 and max(scores) > 0.5
    assert abs(lines[0]["loss"]) < 1e-5 and math.isclose(lines[0]["ratio"], 1, rel_tol=1e-5)
    assert lines[0]["kl"] < 1e-6 < lines[-1]["kl"]
    assert {"rollout/tokens", "rollout/tokens_per_s", "rollout/cut_off", "tokens_per_s"} <= lines[-1].keys()
    assert 0 < lines[-1]["mfu"] < lines[-1]["utilisation"], "rows are padded, and hold several answers"


def test_a_run_stopped_again_and_again_equals_one_in_a_piece_bit_for_bit(settings, mesh, tmp_path):
    keys = {"minibatches": 2, "iterations": 2, "adaptive_kl": True, "kl_target": 1e-4, "drop_zero_variance": False}
    config = settings(stages__rl__steps=9, **{f"stages__rl__task__{key}": value for key, value in keys.items()})
    world.train(config, tmp_path / "whole", mesh)
    # in the first rollouts, in the first pass of a phase, in rollouts, in the second pass, at the end of a phase
    for stop, tokens, saved in ((0, 2, []), (1, 0, [2]), (4, 3, [4]), (6, 0, [7]), (7, 0, [8])):
        world.train(config, tmp_path / "parts", mesh, stop, tokens)
        assert committed_steps(tmp_path / "parts" / "rl")[-1:] == saved
    world.train(config, tmp_path / "parts", mesh)
    assert world.numbers(tmp_path / "parts") == world.numbers(tmp_path / "whole")
    lines = world.numbers(tmp_path / "whole")
    assert len(lines) == 9 and lines[0]["ratio"] == pytest.approx(1, abs=1e-5) != lines[2]["ratio"]
    scores = [line["score/mean"] for line in lines]
    assert scores[0] == scores[3] and scores[4] == scores[7], "a phase is four steps on the same trajectories"
    betas = [lines[n]["beta"] for n in (0, 4, 8)]
    np.testing.assert_allclose(betas, [0.01, 0.01 / 1.5, 0.01], err_msg="no KL at first, more than the target then")


def test_groups_without_variance_are_dropped_and_counted(settings, mesh, params):
    config = settings(**{"stages.rl.task.rewards": [{"name": "tests.rl.own:first_prompt_alone"}]},
                      stages__rl__task__prompts=6, stages__rl__task__kl=0.0)  # fmt: skip
    with jax.set_mesh(mesh):
        for drop, kept in ((True, 4), (False, 24)):
            task = make_task(override_rl(config, drop_zero_variance=drop), mesh)
            work = task.work(0, params)
            task.close()
            assert work.numbers["rollout/zero_variance_groups"] == 5
            assert work.denominator == kept and len(work.sample_ids) == kept / 4
            assert work.counts["tokens"] == (stacked(work.batch).batch.text.segments_BT > 0).sum()


def override_rl(config, **keys):
    """`config` with other keys of its only stage's task."""
    stage = config.stages[0]
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, task={**stage.task, **keys}),))


@pytest.mark.parametrize("keys", [{"kl": 0.1, "minibatches": 2}, {"kl": 0.0, "drop_zero_variance": False}])
def test_steps_with_nothing_to_learn_change_nothing(settings, mesh, tmp_path, keys):
    config = override_rl(settings(stages__rl__steps=2), rewards=[{"name": "regex", "pattern": "no such text"}], **keys)
    task = world.train(config, tmp_path, mesh)
    lines = records(tmp_path)
    assert [line["grad_norm"] for line in lines] == [0, 0] and lines[0]["rollout/zero_variance_groups"] == 2
    assert [line["skipped"] for line in lines] == [1, 1]
    before = runs.origin(config, config.stages[0], task.model, tmp_path)[0](task.model.abstract())
    after = load_params(tmp_path / "rl" / "2", task.model.abstract())
    for one, other in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_groups_that_tie_are_held_to_the_reference_where_they_are_kept(settings, mesh, params):
    tied = override_rl(
        settings(), rewards=[{"name": "regex", "pattern": "no such text"}], kl=0.1, drop_zero_variance=False
    )
    task = make_task(tied, mesh)
    with jax.set_mesh(mesh):
        assert task.work(0, params).denominator == 8
    task.close()


def test_sampling_uses_the_arrays_of_training(settings, mesh, params):
    config = settings()
    task = make_task(config, mesh)
    with jax.set_mesh(mesh):
        generator = task._actor(params).generator
        assert all(a is b for a, b in zip(jax.tree.leaves(generator.params), jax.tree.leaves(params), strict=True))
    task.close()


def test_whatever_the_mesh_rollouts_are_the_same(settings, mesh, params):
    """Of their own by default, where training splits weights; that of training, if it is asked for; one device."""
    config, trained_on = (
        settings(mesh__fsdp=8, stages__rl__task__kl=0.0),
        sharding.make_mesh(sharding.MeshConfig(fsdp=8)),
    )
    drawn = []
    for where, asked, own, said in (
        (trained_on, None, dict(data=4, fsdp=1, context=1, tensor=2), "rollouts on a mesh of data=4 tensor=2; once a"),
        (trained_on, dict(fsdp=8), dict(trained_on.shape), "rollouts on the mesh of training (fsdp=8), with the"),
        (mesh, None, dict(mesh.shape), "rollouts on the mesh of training (one device), with the"),
    ):
        task = make_task(override_rl(config, rollout_mesh=asked, drop_zero_variance=False), where)
        assert dict(task._rollout_mesh.shape) == own and said in task.report
        with jax.set_mesh(where):
            places = sharding.param_shardings(where, task.model.abstract(), task.model.axes())
            task.work(0, jax.device_put(params, places))
        task.close()
        drawn.append([step for lesson in task._phases.lessons for step in lesson.steps])
    assert drawn[0] and len(drawn[0]) == len(drawn[1]) == len(drawn[2])
    for a, *others in zip(*drawn, strict=True):
        for b in others:
            np.testing.assert_array_equal(a.tokens_T, b.tokens_T)
            np.testing.assert_allclose(a.logp_T, b.logp_T, atol=1e-5)


def test_training_is_the_same_wherever_rollouts_are_drawn_and_parameters_are_laid_out_once_a_phase(
    settings, tmp_path, monkeypatch
):
    mesh, laid_out, put = sharding.make_mesh(sharding.MeshConfig(fsdp=8)), [], rollout.trainer_generator

    def counting(*args):
        made = put(*args)
        laid_out.append({x.sharding.mesh for x in jax.tree.leaves(made.params)})
        return made

    monkeypatch.setattr("vlmem_jax.rl.task.trainer_generator", counting)
    keys = dict(iterations=2, prompts=4, rollout_rows=8, drop_zero_variance=False)
    config = override_rl(settings(mesh__fsdp=8, stages__rl__steps=4), **keys)
    for name, own in (("decoding", None), ("training", dict(fsdp=8))):
        world.train(override_rl(config, rollout_mesh=own), tmp_path / name, mesh)
    decoding = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=1, tensor=2))
    assert laid_out == 2 * [{decoding}] + 2 * [{mesh}], "two phases"
    for one, other in zip(world.numbers(tmp_path / "decoding"), world.numbers(tmp_path / "training"), strict=True):
        assert one["score/mean"] == other["score/mean"] and one["rollout/tokens"] == other["rollout/tokens"]
        np.testing.assert_allclose([one["loss"], one["kl"]], [other["loss"], other["kl"]], atol=1e-5)
        np.testing.assert_allclose(one["grad_norm"], other["grad_norm"], rtol=1e-3)


def test_the_reference_may_be_a_function_of_the_parameters(settings, mesh, params):
    config = override_rl(settings(), reference="tests.rl.own:never", kl=0.1, drop_zero_variance=False)
    task = make_task(config, mesh)
    with jax.set_mesh(mesh):
        rows = stacked(task.work(0, params).batch)
    task.close()
    allowed = config.model.decoder.vocab - len(set(task.banned_ids))
    counts = rows.batch.text.weights_BT > 0
    np.testing.assert_allclose(rows.ref_logp_BT[counts], -math.log(allowed), rtol=1e-5)


def test_rewards_that_fail_stop_the_run_or_score_zero(settings, mesh, params):
    failing = [{"name": "tests.rl.own:sometimes_nan"}]
    config = override_rl(settings(), rewards=failing, kl=0.0)
    with jax.set_mesh(mesh):
        task = make_task(config, mesh)
        with pytest.raises(ValueError, match=r"sometimes_nan must give a finite number, got nan \(sample .*text"):
            for step in range(5):
                task.work(step, params)
        task.close()
        task = make_task(override_rl(config, on_reward_error="zero"), mesh)
        errors = [task.work(step, params).numbers["score/errors"] for step in range(5)]
        task.close()
    assert 0 < sum(errors) < 5 * 8


def test_bad_prompts_stop_the_run_or_are_skipped(settings, mesh, folder):
    lines = [{"prompt": "Say b", "answer": "b"}, {"prompt": "b" * 200, "answer": "b"}, {"prompt": "Say c"},
             {"prompt": "?", "answer": "b", "image": "none.png"}]  # fmt: skip
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answers = {"rewards": [{"name": "answer"}], "prompts": 4}
    config = override_rl(settings(**{"data.train.0.path": str(folder / "bad.jsonl")}), **answers)
    task = make_task(config, mesh)
    with pytest.raises(ValueError, match=r"on_bad_sample=skip"):
        for _ in range(4):
            task._stream.take()
    task.close()
    skipping = dataclasses.replace(config, data=dataclasses.replace(config.data, on_bad_sample="skip"))
    task = make_task(skipping, mesh)
    assert {task._stream.take().prompt.text for _ in range(6)} == {"Say b"}
    reasons = {name.rpartition(":")[2]: reason for name, reason in task._stream.skipped.items()}
    task.close()
    assert "lower stages.rl.task.max_new_tokens" in reasons["2"] and "must have an answer" in reasons["3"]
    assert "none.png" in reasons["4"] and len(reasons) == 3
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, lines[1:])))
    task = make_task(skipping, mesh)
    with pytest.raises(ValueError, match="no prompt of the data can be used; one of them"):
        task._stream.take()
    task.close()


def test_the_stream_goes_on_where_it_was(settings, mesh):
    config = settings()
    first, second = make_task(config, mesh)._stream, make_task(config, mesh)._stream
    names = [first.take().prompt.name for _ in range(15)]
    assert len(set(names[:6])) == 6, "all once, then all again"
    second.go_to(9)
    assert [second.take().prompt.name for _ in range(6)] == names[9:] and second.drawn == 15
    for stream in (first, second):
        stream.close()


def test_the_order_of_prompts_is_that_of_the_seed(settings, mesh):
    orders = []
    for seed in (0, 0, 1, 2):
        stream = make_task(settings(seed=seed), mesh)._stream
        orders.append([stream.take().key[1] for _ in range(6)])
        stream.close()
    assert orders[0] == orders[1] and len({tuple(order) for order in [*orders, range(6)]}) == 4


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"task.group_siz": 4},
            "unknown key .*stages.rl.task.group_siz; did you mean config.stages.rl.task.group_size",
        ),
        ({"task.group_size": 1}, "config.stages.rl.task: group_size must be at least 2"),
        ({"task.temperature": 0.0}, "temperature must be positive"),
        ({"task.clip": 1.0}, "clip must be between 0 and 1"),
        ({"task.minibatches": 9}, "minibatches must be at most prompts x group_size = 8"),
        ({"task.top_p": 0.0}, "top_p must be above 0"),
        ({"task.kl": -1.0}, "kl and advantage_eps must be at least 0"),
        ({"task.kl": 0.0, "task.adaptive_kl": True}, "adaptive_kl changes kl, which must be positive"),
        ({"task.reference": "base"}, "reference must be start or MODULE:FUNCTION"),
        ({"task.reference": "no.module:f"}, "stages.rl.task.reference 'no.module:f' must be MODULE:FUNCTION"),
        ({"task.rewards": [{"name": "excat"}]}, "config.stages.rl.task.rewards.0.name must be one of"),
        ({"task.max_new_tokens": 128}, "task.max_new_tokens 128 must be less than data.pack_tokens 128"),
        ({"task.kind": "next_token"}, "config.stages.rl.task: next_token has no keys, got rewards"),
        ({"task.kind": "gpro"}, "stages.rl.task.kind must be one of next_token, grpo, memory_sft; got 'gpro'"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_done(settings, tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        config = settings(**{f"{STAGE}.{key}": value for key, value in keys.items()})
        runs.run(config, tmp_path / "run", tasks=runs.TASKS | rl.TASKS)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.train": []}, "data.train must name at least one JSONL file of prompts"),
        ({"model.memory": "comemo", "model.memory.decode_position": "length"}, "decode_position must be continue"),
        ({"model.decoder.ntk_factor": 2.0, "model.decoder.max_positions": 64}, "pack_tokens 128 must be at most"),
    ],
)
def test_models_that_draw_otherwise_than_they_train_are_refused(settings, changes, message):
    config = settings(**{key: value for key, value in changes.items() if key != "data.train"})
    if "data.train" in changes:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=()))
    with pytest.raises(ConfigError, match=message):
        GRPO.check(config, config.stages[0])


def test_vlmem_train_runs_it_after_another_stage(folder, mesh, tmp_path, monkeypatch, capsys):
    """Supervised, then reinforced: with images, CoMemo, held-out prompts, and a start from the stage before."""
    from vlmem_jax.cli.main import main

    monkeypatch.setattr(runs, "make_mesh", lambda config: mesh)
    config = world.config(folder, rl=dict(kl=0.1), checkpoint=dict(every=1, keep_last=1, keep_best=1), eval_every=1)
    data = supervised.config(folder).data.to_dict() | {"eval": []}
    first = dict(name="sft", steps=1, learning_rate=1e-2, data=data)
    config.stages = [first, {**config.stages[0], "steps": 2, "trainable": ["decoder/head", "memory/"]}]
    (tmp_path / "config.py").write_text(
        f"import json\nfrom ml_collections import ConfigDict\n\n\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    command = ["train", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run")]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "8 prompts; a phase samples 4 answers to each of 2" in said and "stage rl is done" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [line for line in lines if line["stage"] == "rl" and "eval/score" in line]
    assert len(scores) == 2 and all(line["eval/loss"] == -line["eval/score"] for line in scores)
    assert [line["step"] for line in lines if line["stage"] == "rl" and "kl" in line] == [1, 2]
