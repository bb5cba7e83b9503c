"""Real clusters: processes that share nothing but a folder train as one, are killed, and go on in other numbers."""

import collections
import json
import random
import signal
import time

import numpy as np
import pytest

from tests.clusters import finish, start
from tests.train import world
from vlmem_jax.checkpoint.folder import committed_steps
from vlmem_jax.cli.main import main

STEPS, ROWS = 16, 8
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def mixture(folder):
    """One pass over two files, of text and pictures, is exactly STEPS x ROWS rows of two tiles: each is full.

    A row has two samples of one tile (text alone has a blank one), or one of two.
    """
    short, long = [], []
    for n in range(ROWS * STEPS):
        picture = {"image": f"{n % 8 * 3}.png"} if n % 2 else {}  # every third is of one tile
        question = "<image>\nSay a word." if picture else "Say" + " it" * (n % 7)
        answer = "ab" * (1 + n % 5)
        short.append({**picture, "conversations": turns(question, answer)})
        if n % 2:
            long.append({"image": ["0.png", f"{n % 8 * 3}.png"], "conversations": turns("<image>\n<image>", answer)})
    for name, lines in (("short", short), ("long", long), ("held_out", short[:6])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [dict(path=str(folder / f"{name}.jsonl")) for name in ("short", "long")]


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """`vlmem train` of one stage, up to its workdir."""
    folder = world.make(tmp_path_factory.mktemp("world"))
    data = dict(train=mixture(folder), rows=ROWS, pack_tokens=160, pack_tiles=2, open_packs=1, threads=1)
    data["eval"] = [dict(path=str(folder / "held_out.jsonl"))]
    config = world.config(
        folder,
        data=data,
        stages=[dict(name="all", steps=STEPS, learning_rate=1e-3, trainable=["projector/", "decoder/head"])],
        checkpoint=dict(every=4, keep_last=2, keep_best=0),
        eval_every=4,
        log_samples=True,
    )
    config.model.memory = None  # as small as what goes through every host can be
    return ["train", "--config", str(world.save_config(folder, config)), *MESH, "--workdir"]


@pytest.fixture(scope="module")
def whole(line, tmp_path_factory):
    """Workdir of the run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp("whole")
    assert main([*line, str(workdir)]) == 0
    return workdir


def await_records(workdir, count, hosts):
    """Until that many steps are in the metrics."""
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert all(host.poll() is None for host in hosts), finish(hosts, [0] * len(hosts))
        time.sleep(0.02)


def samples(workdir):
    """Step -> its samples, of all hosts and of all times it was done."""
    found = collections.defaultdict(list)
    for file in (workdir / "samples").iterdir():
        for record in map(json.loads, file.read_text().splitlines()):
            found[record["step"]] += record["samples"]
    return found


def check_equal(workdir, whole, killed_after):
    """Losses are those of the run in one piece, and every sample was seen once."""
    losses, expected = world.losses(workdir), world.losses(whole)
    assert losses.keys() == expected.keys()
    np.testing.assert_allclose(list(losses.values()), list(expected.values()), rtol=1e-6)
    held_out, expected = (
        {r["step"]: r["eval/loss"] for r in world.records(run) if "eval/loss" in r} for run in (workdir, whole)
    )
    assert held_out.keys() == expected.keys() and len(expected) == STEPS / 4
    np.testing.assert_allclose([held_out[step] for step in expected], list(expected.values()), rtol=1e-6)
    seen, expected = samples(workdir), samples(whole)
    assert {step: set(names) for step, names in seen.items()} == {step: set(names) for step, names in expected.items()}
    for step in range(killed_after + 1, STEPS + 1):
        assert sorted(seen[step]) == sorted(expected[step]), "no sample is on two hosts"


def test_the_whole_run_sees_every_sample_once(whole):
    seen = collections.Counter(name for names in samples(whole).values() for name in names)
    assert len(seen) == 1.5 * STEPS * ROWS and set(seen.values()) == {1}


STOPPED_IN_STEP_5 = """
    import signal
    from vlmem_jax.train.next_token import NextToken
    work = NextToken.work
    def signalled(self, step, params):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return work(self, step, params)
    NextToken.work = signalled
"""


@pytest.mark.slow
def test_a_cluster_that_is_stopped_and_killed_goes_on_in_other_numbers_of_processes(line, whole, tmp_path):
    """Two processes until one gets a signal, then four until they are killed, then one to the end."""
    workdir = tmp_path / "run"
    (out, _), (silent, _) = finish(start([*line, str(workdir)], script=STOPPED_IN_STEP_5), [0, 0])
    step = committed_steps(workdir / "all")[-1]
    assert f"stopped at step {step} of stage all, which is saved" in out and "goodput" in out
    assert "stage" not in silent, "one host speaks for all"
    assert 4 <= step < 8 and max(world.losses(workdir)) == ("all", step)

    hosts = start([*line, str(workdir)], processes=4)
    # in step 12 one more checkpoint is whole, and the next is begun
    await_records(workdir, random.randrange(12, STEPS), hosts)
    time.sleep(random.random() / 5)
    for host in hosts:
        host.kill()
    texts = finish(hosts, [-signal.SIGKILL] * 4)
    assert f"from its checkpoint of step {step}" in texts[0][0]
    killed_after = max(samples(workdir))

    assert main([*line, str(workdir)]) == 0
    check_equal(workdir, whole, killed_after)
    assert len(list((workdir / "plans").iterdir())) == 2, "of what is trained and what is held out, once for all"
    assert sorted(file.name for file in (workdir / "samples").iterdir()) == [f"{n}.jsonl" for n in range(4)]


@pytest.mark.slow
def test_hosts_that_differ_refuse_to_start(line, tmp_path):
    last, script = ["--config.seed=7", "--config.optimizer.b2=0.9"], "import vlmem_jax; vlmem_jax.__version__ = '9.9'"
    for _, error in finish(start([*line, str(tmp_path / "run")], last=last, script=script), [2, 2]):
        assert (
            "hosts must run the same code and config, but these differ:\n"
            "  config.optimizer.b2: 0.9 on host 1, 0.999 on host 0\n"
            "  config.seed: 7 on host 1, 42 on host 0\n"
            '  vlmem_jax: "9.9" on host 1, "'
        ) in error, error
    assert not (tmp_path / "run").exists()
