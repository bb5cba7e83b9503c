"""GRPO on several processes: what is drawn, scored and learned is what one process gives with as many devices."""

import json

import numpy as np
import pytest

from tests.clusters import finish, start
from tests.rl import memory_world
from tests.train import world
from vlmem_jax.cli.main import main


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """`vlmem train` of the stage that forms memories, up to its workdir."""
    folder = tmp_path_factory.mktemp("world")
    config = memory_world.config(folder)
    config.stages = config.stages[:1]
    config.stages[0]["rl"] |= dict(
        rewards=[dict(name="tests.rl.own:length")], adaptive_kl=True, rollout_mesh=dict(data=1, fsdp=4, tensor=2)
    )
    config.mesh, config.data.rows = dict(data=2, fsdp=4), 8
    return ["train", "--config", str(world.save_config(folder, config)), "--workdir"]


def records(workdir):
    """Of all steps, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timed = ("_per_s", "seconds", "goodput")
    return [
        {key: value for key, value in line.items() if not any(word in key for word in timed)}
        for line in lines
        if "score/mean" in line
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("compile_fast")
def test_two_processes_draw_and_learn_what_one_does(line, tmp_path):
    (out, _), (silent, _) = finish(start([*line, str(tmp_path / "two")]), [0, 0])
    assert "stage formation is done" in out and "stage" not in silent
    assert main([*line, str(tmp_path / "one")]) == 0
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == 2 and one[0]["memory/per_answer"] > 0.5 and one[1]["kl"] > 0 and "beta" in one[0]
    assert all(line["grad_norm"] > 0 for line in one)
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float):
                np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
            else:
                assert found[key] == value
