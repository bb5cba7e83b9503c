"""VisMem's stages, one after the other: what each trains and leaves alone, what is recorded, on one process and two."""

import contextlib
import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest

from tests.clusters import finish, start
from tests.patches_world import save_tokenizer
from tests.rl import memory_world
from tests.rl.memory_world import INVOCATION
from tests.train import world
from vlmem_jax import rl
from vlmem_jax.checkpoint import load_params, save_params
from vlmem_jax.checkpoint.store import parameter_paths
from vlmem_jax.cli.main import main
from vlmem_jax.config import ConfigError, override, to_dict
from vlmem_jax.hub.convert import export_folder
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPO
from vlmem_jax.train import run as runs
from vlmem_jax.train.config import experiment
from vlmem_jax.trees import flatten

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """An Experiment of the two stages on prompts with one image or none, from keys that differ."""
    config = memory_world.config(tmp_path_factory.mktemp("world"))

    def made(**changes):
        return experiment(override(config, {key.replace("__", "."): value for key, value in changes.items()}))

    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The config file of a warm-up and both stages; whatever these two draw, they draw 6 answers at a time."""
    folder = tmp_path_factory.mktemp("three")
    config = memory_world.config(folder)
    formation, invocation = config.stages
    for stage in config.stages:
        stage["task"] |= dict(prompts=6, group_size=3, rollout_rows=6)
    formation["task"] |= dict(
        rewards=[dict(name="tests.rl.own:length")], adaptive_kl=True, rollout_mesh=dict(data=1, fsdp=2, tensor=2)
    )
    warmup = {key: formation[key] for key in ("learning_rate", "trainable")}
    warmup |= dict(name="warmup", steps=1, task=dict(kind="memory_sft", prompts=6, rollout_rows=4))
    config.mesh, config.data.eval = dict(data=2, fsdp=2), config.data.train
    config.stages = [warmup, formation, invocation]
    return world.save_config(folder, config)


def train(file, workdir):
    """Goes on with a run on this process, on four devices; what was said."""
    said, devices = io.StringIO(), jax.devices()[:4]
    with contextlib.redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: devices)
        assert main(["train", "--config", str(file), "--workdir", str(workdir)]) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def trained(file, tmp_path_factory):
    """The workdir of all three, and what was said."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(file, workdir)


@pytest.fixture
def params(make):
    """Gives the parameters of a checkpoint, by path."""
    shapes = VLM(make().model).abstract()
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=ONE), shapes)
    return lambda folder: flatten(jax.device_get(load_params(folder, target)))


def of_steps(workdir):
    """The records of steps and evaluations."""
    return [line for line in world.records(workdir) if "loss" in line or "eval/loss" in line]


@pytest.mark.slow
def test_each_stage_trains_its_own_and_leaves_the_rest_as_it_was(trained, params):
    workdir, said = trained
    assert "stage invocation is done" in said
    kept = {path.split("/")[1] for path in parameter_paths(workdir / "invocation" / "2")}
    assert kept == {"query_builder", "short", "long", "special_in", "special_out", "invoke_logit_bias"}
    assert parameter_paths(workdir / "base" / "0") > parameter_paths(workdir / "invocation" / "2")
    before, after = (params(workdir / "formation" / step) for step in ("1", "2"))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.split("/")[1] for path in changed} == {"query_builder", "short", "long"}
    adapters = {f"memory/{kind}/lora/{target}/{x}" for kind in ("short", "long") for target in "qv" for x in "ab"}
    assert adapters <= changed
    at_end = params(workdir / "invocation" / "2")
    changed = {path for path in after if not np.array_equal(after[path], at_end[path])}
    assert changed and all(path.startswith(INVOCATION) for path in changed)
    by_row = np.abs(at_end["memory/special_out"] - after["memory/special_out"]).max(-1)
    assert by_row[[0, 2]].min() > 5 * by_row[[1, 3]].max(), "end rows learn slowly"


@pytest.mark.slow
def test_each_stage_records_its_numbers(trained):
    lines = of_steps(trained[0])
    steps = [line for line in lines if "loss" in line]
    assert [line["stage"] for line in steps] == ["warmup"] + 2 * ["formation"] + 2 * ["invocation"]
    assert all(line["grad_norm"] > 0 for line in steps)
    assert [line["eval/loss"] != 0 for line in lines if "eval/loss" in line][:2] == [True, True]
    for line in steps[1:]:
        assert {"score/base", "score/gain", "memory/per_answer", "memory/answers", "memory/long"} <= line.keys()
        assert ("penalty/type" in line) == (line["stage"] == "invocation")
    first, second = steps[1:3]
    assert max(first["memory/per_answer"], second["memory/per_answer"]) > 0.5
    assert abs(first["kl"]) < 1e-5 < second["kl"] and abs(first["ratio"] - 1) < 1e-4 and "beta" in first


STOPPED_IN_ROLLOUTS = """
    import signal
    from vlmem_jax.generate.engine import Engine
    from vlmem_jax.rl import GRPO
    begin, step = GRPO._begin, Engine.step
    drawn = None
    def begin_counting(self, phase, params):
        global drawn
        drawn = 0 if (self._stage.name, phase) == {where!r} else None
        begin(self, phase, params)
    def counted(self):
        global drawn
        if drawn is not None:
            drawn += 1
            if drawn == 3:
                signal.raise_signal(signal.SIGTERM)
            if drawn == 6:
                raise SystemExit("more was drawn though a signal had come")
        return step(self)
    GRPO._begin, Engine.step = begin_counting, counted
"""


@pytest.mark.slow
def test_two_processes_that_are_stopped_within_rollouts_learn_what_one_does_in_a_piece(trained, file, tmp_path):
    """From the end of the warm-up, whose rollouts are made as those of the stage after it; each stage is stopped, by a
    signal that comes to one of the processes alone."""
    workdir, later = tmp_path / "run", ("formation", "invocation", "metrics.jsonl")
    shutil.copytree(trained[0], workdir, ignore=shutil.ignore_patterns(*later))
    line = ["train", "--config", str(file), "--workdir", str(workdir)]
    for where, said in (
        (("formation", 1), "stopped at step 1 of stage formation, which is saved"),
        (("invocation", 0), "stopped before step 1 of stage invocation is done; the same command goes on from there"),
    ):
        script = STOPPED_IN_ROLLOUTS.format(where=where)
        (out, _), (silent, _) = finish(start(line, devices=4, script=script), [0, 0])
        assert said in out and "stage" not in silent
    assert "stage formation is done" in out
    assert "stage invocation is done" in train(file, workdir)
    expected = [line for line in of_steps(trained[0]) if line["stage"] != "warmup"]
    for one, other in zip(expected, of_steps(workdir), strict=True):
        assert other.keys() == one.keys()
        for key, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(other[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
            else:
                assert other[key] == value


ENDS = """
    from tests.rl import own
    def ends(output, prompt):
        raise SystemExit("the judge has no licence")
    own.length = ends
"""


@pytest.mark.slow
def test_whatever_a_reward_raises_on_one_of_two_processes_ends_both_with_its_words(tmp_path):
    config = memory_world.config(tmp_path)
    config.mesh, config.stages = dict(data=2, fsdp=2), config.stages[:1]
    own = dict(rewards=[dict(name="tests.rl.own:length")], invocation=dict(mode="never"), max_new_tokens=3)
    config.stages[0]["task"] |= own
    line = ["train", "--config", str(world.save_config(tmp_path, config)), "--workdir", str(tmp_path / "run")]
    for _, error in finish(start(line, devices=4, script=ENDS), [2, 2]):
        assert "a reward raised SystemExit: the judge has no licence" in error, error


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__memory": "none", "stages__1__task__invocation_penalty": 0.3}, "are for a memory that speaks"),
        ({"stages__0__task__invocation_penalty": 0.3}, "none have been formed yet"),
        (
            {"stages__1__task__invocation_penalty": 0.3, "stages__0__trainable": ("decoder/",)},
            "none have been formed yet",
        ),
        ({"stages__0__task__invocation__max_invocations": 40}, "max_invocations must be at most that of the model"),
        ({"stages__1__task__base": False}, "invocation_penalty must be at least 0, and needs base=True"),
        ({"stages__0__task__base": False, "stages__0__task__paired_base": True}, "paired_base is of answers without"),
        ({"stages__1__task__rev_fraction": 1.5}, "rev_fraction must be from 0 to 1"),
        (
            {"stages__0__task__rev_fraction": 0.5},
            "is of the rollouts that invocation_penalty takes; got 0.5 and .*None",
        ),
        ({"stages__0__task__max_new_tokens": 180}, "with memories 198, must be less than data.pack_tokens 192"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_done(make, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        runs.run(make(**changes), tmp_path / "run", tasks=runs.TASKS | rl.TASKS)
    assert not (tmp_path / "run").exists()


def test_a_released_base_has_formed_no_memories(make, tmp_path):
    """Another checkpoint may have, and an exported memory has."""
    for memory, outcome in (("none", pytest.raises(ConfigError, match="none have been formed yet")),
                            ("vismem", contextlib.nullcontext())):  # fmt: skip
        model = make().model
        model = model if memory == model.memory_kind else dataclasses.replace(model, memory=None)
        run = tmp_path / memory
        save_params(run / "0", jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), VLM(model).abstract()))
        about = {"model": to_dict(model), "image": {}, "system": None}
        (run / "model.json").write_text(json.dumps(about))
        save_tokenizer(run / "tokenizer")
        export_folder(run, tmp_path / f"{memory}_hf")
        settings = make(init=str(tmp_path / f"{memory}_hf"))
        alone = dataclasses.replace(settings, stages=settings.stages[1:])
        with outcome:
            GRPO.check(alone, alone.stages[0])
        GRPO.check(settings, settings.stages[1])
    ours = dataclasses.replace(alone, init=str(tmp_path / "vismem"))
    GRPO.check(ours, ours.stages[0])
