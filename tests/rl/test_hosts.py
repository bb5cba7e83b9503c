"""Tasks on several processes: what is drawn, scored and learned is what one process gives with as many devices."""

import json

import numpy as np
import pytest

from tests.clusters import finish, start
from tests.rl import memory_world
from tests.train import world
from vlmem_jax.cli.main import main


@pytest.fixture
def line(tmp_path):
    """`vlmem train` of a warm-up and a stage that trains what forms memories, up to its workdir."""
    config = memory_world.config(tmp_path)
    formation = config.stages[0]
    formation["rl"] |= dict(
        rewards=[dict(name="tests.rl.own:length")], adaptive_kl=True, rollout_mesh=dict(data=1, fsdp=4, tensor=2)
    )
    warmup = {key: formation[key] for key in ("steps", "learning_rate", "trainable")}
    warmup |= dict(name="warmup", task="memory_sft", rl=dict(prompts=6, rollout_rows=4))
    config.mesh, config.data.rows, config.data.eval = dict(data=2, fsdp=4), 8, config.data.train
    config.stages = [warmup, formation]
    return ["train", "--config", str(world.save_config(tmp_path, config)), "--workdir"]


def records(workdir):
    """Of all steps, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("_per_s", "seconds", "goodput", "mfu", "utilisation")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in timed)}
        for line in lines
        if "loss" in line or "eval/loss" in line
    ]


def same(expected, found):
    """Whether records of two runs agree but for rounding."""
    for one, other in zip(expected, found, strict=True):
        assert other.keys() == one.keys()
        for key, value in one.items():
            if isinstance(value, float):
                np.testing.assert_allclose(other[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
            else:
                assert other[key] == value


@pytest.mark.slow
def test_two_processes_draw_and_learn_what_one_does(line, tmp_path):
    (out, _), (silent, _) = finish(start([*line, str(tmp_path / "two")]), [0, 0])
    assert "stage warmup is done" in out and "stage formation is done" in out and "stage" not in silent
    assert main([*line, str(tmp_path / "one")]) == 0
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    same(one, two)
    assert [line["stage"] for line in one] == 3 * ["warmup"] + 3 * ["formation"]
    assert all(line["grad_norm"] > 0 for line in one if "loss" in line)
    assert all(line["eval/loss"] for line in one if "eval/loss" in line)
    first, second = one[3:5]
    assert first["memory/per_answer"] > 0.5 and second["kl"] > 0 and "beta" in first
