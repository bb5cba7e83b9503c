"""`vlmem train` as a user runs it: through all stages, stopped, killed, and asked for what does not work."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from tests.train import world
from vlmem_jax.checkpoint import find
from vlmem_jax.checkpoint.folder import committed_steps
from vlmem_jax.cli.main import main
from vlmem_jax.hub.convert import export_folder
from vlmem_jax.train.metrics import Recorder

ONE_STAGE = dict(
    stages=[dict(name="all", steps=9, learning_rate=1e-2, warmup_fraction=0.5, schedule="cosine")],
    checkpoint=dict(every=4, keep_last=2, keep_best=1),
    eval_every=4,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(folder):
    """Config file and workdir of a run through two stages."""
    stages = [
        dict(name="first", steps=2, learning_rate=1e-2),
        dict(name="second", steps=2, learning_rate=1e-2),
    ]
    file, workdir = world.config_file(world.make(folder / "finished"), stages=stages), folder / "finished" / "run"
    assert main(["train", "--config", str(file), "--workdir", str(workdir)]) == 0
    return file, workdir


def test_a_workdir_holds_all_that_inference_needs(finished):
    _, workdir = finished
    assert find(workdir).step_folder == workdir / "second" / "2"
    assert find(workdir).model.keys() == {"model", "image", "system"}
    assert (find(workdir).tokenizer / "tokenizer.json").is_file()
    assert list(world.losses(workdir)) == [("first", 1), ("first", 2), ("second", 1), ("second", 2)]
    assert any((workdir / "tensorboard").iterdir())


def test_a_run_starts_from_another_or_from_a_hugging_face_folder(finished, tmp_path, capsys):
    file, workdir = finished
    export_folder(workdir, tmp_path / "hf")
    for source in (workdir, tmp_path / "hf"):
        run = tmp_path / f"from_{source.name}"
        line = [
            "--config",
            str(file),
            "--workdir",
            str(run),
            f"--config.init={source}",
            "--config.stages.first.steps=1",
        ]
        assert main(["train", *line, "--stage", "first"]) == 0
        assert f"stage first: 1 steps from {source}" in capsys.readouterr().out
    one, other = (world.losses(tmp_path / name) for name in ("from_run", "from_hf"))
    assert one == other
    assert one[("first", 1)] < world.losses(workdir)[("second", 1)], "it goes on from trained parameters"


def test_a_second_call_finds_nothing_to_do(finished, capsys):
    file, workdir = finished
    assert main(["train", "--config", str(file), "--workdir", str(workdir)]) == 0
    assert "stage second is done" in capsys.readouterr().out


def error_of(capsys, *line):
    assert main(["train", *map(str, line)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err


def test_another_config_in_the_same_workdir_names_the_keys(finished, capsys):
    file, workdir = finished
    line = ["--config", file, "--workdir", workdir, "--config.seed=7", "--config.stages.first.learning_rate=0.5"]
    text = error_of(capsys, *line)
    assert "seed: 42 there, 7 now" in text
    assert "stages.first.learning_rate: 0.01 there, 0.5 now" in text
    assert "another --workdir" in text


def test_how_a_run_is_carried_out_may_change(finished):
    file, workdir = finished
    line = ["--config", str(file), "--workdir", str(workdir), "--config.log_every=5", "--config.mesh.data=2"]
    assert main(["train", *line, "--config.mesh.fsdp=-1"]) == 0
    assert json.loads((workdir / "config.json").read_text())["log_every"] == 5


def test_a_stage_needs_the_one_before_it(finished, folder, capsys):
    file, workdir = finished
    text = error_of(capsys, "--config", file, "--workdir", folder / "fresh", "--stage", "second")
    assert "stage second starts from the end of stage first, of which 0 of 2 steps are done" in text
    text = error_of(capsys, "--config", file, "--workdir", folder / "fresh", "--stage", "third")
    assert "there is no stage 'third'; the experiment has first, second" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ("--config.optimiser.b1=0.5", "unknown key config.optimiser; did you mean config.optimizer?"),
        ("--config.stages.first.steps=many", "config.stages.0.steps must be int; got 'many'"),
        ("--config.optimizer.b2=1.5", "config.optimizer: b2 must be at least 0 and below 1, got 1.5"),
        ("--config.model.preset=large", "config.model.preset must be one of"),
        ("--config.checkpoint.every=3", "must be a multiple of eval_every"),
        ("--config.stages.first.accumulation=3", "data.rows 8 must be a multiple of stages.first.accumulation 3"),
        ("--config.mesh.data=3", "the mesh must use all 8 devices, but mesh.data=3"),
    ],
)
def test_a_bad_key_is_named(finished, folder, capsys, change, message):
    best = "--config.checkpoint.keep_best=1"
    assert message in error_of(capsys, "--config", finished[0], "--workdir", folder / "fresh", change, best)
    assert not (folder / "fresh" / "first").exists()


def test_a_workdir_is_not_made_of_a_converted_checkpoint(finished, tmp_path, capsys):
    (tmp_path / "model.json").write_text("{}")
    assert "--config.init=" in error_of(capsys, "--config", finished[0], "--workdir", tmp_path)


def test_a_checkpoint_of_another_model_lists_what_differs(finished, folder, capsys):
    file, workdir = finished
    line = ["--config", file, "--workdir", folder / "other", f"--config.init={workdir}"]
    text = error_of(capsys, *line, "--config.model.memory.mlp_width=64")
    assert "memory/blocks/mlp/gate/kernel: (1, 16, 32) in the checkpoint, (1, 16, 64) in the model" in text
    assert "3 arrays differ" in text


def test_the_limit_of_what_is_read_at_once_reaches_the_reading(finished, folder, capsys):
    file, workdir = finished
    line = ["--config", file, "--workdir", folder / "limited", f"--config.init={workdir}"]
    text = error_of(capsys, *line, "--config.checkpoint.restore_concurrent_gb=1e-7")
    assert "checkpoint.restore_concurrent_gb=1e-07 allows" in text and "raise it" in text


def start(file, workdir, script=""):
    """A process that runs `vlmem train` on one device, after `script`."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
    command = (
        f"import sys\nfrom vlmem_jax.cli.main import main\n{textwrap.dedent(script)}\nsys.exit(main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", command, "train", "--config", str(file), "--workdir", str(workdir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )


KILLED_IN_STEP_3 = """
    import os
    from vlmem_jax.train.metrics import Recorder
    record = Recorder.step
    def step(self, n, *numbers):
        record(self, n, *numbers)
        if n == 3:
            os.kill(os.getpid(), 9)
    Recorder.step = step
"""
DISK_FULL_IN_STEP_8 = """
    import resource
    from vlmem_jax.checkpoint import Store
    save = Store.save
    def limited(self, step, *rest):
        if step == 8:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        save(self, step, *rest)
    Store.save = limited
"""


def test_a_run_that_stops_in_every_way_goes_on_bit_for_bit(folder, one_device, tmp_path, capsys, monkeypatch):
    """A kill, Ctrl-C, SIGTERM and a disk that is full stop it, one after the other."""
    file, run = world.config_file(folder, **ONE_STAGE), tmp_path / "run"
    killed = start(file, run, script=KILLED_IN_STEP_3)

    def train(workdir):
        assert main(["train", "--config", str(file), "--workdir", str(workdir)]) == 0
        return capsys.readouterr().out

    train(tmp_path / "whole")
    _, err = killed.communicate()
    assert killed.returncode == -9, err
    assert not committed_steps(run / "all")

    record = Recorder.step
    for sign in (signal.SIGINT, signal.SIGTERM):

        def step(self, *numbers, sign=sign):
            record(self, *numbers)
            signal.raise_signal(sign)

        monkeypatch.setattr(Recorder, "step", step)
        out = train(run)
        stopped = committed_steps(run / "all")[-1]
        assert f"stopped at step {stopped} of stage all, which is saved; the same command goes on from there" in out
        assert max(world.losses(run)) == ("all", stopped)
    monkeypatch.undo()

    full = start(file, run, script=DISK_FULL_IN_STEP_8)
    _, err = full.communicate()
    assert full.returncode == 2
    assert "error: the checkpoint of step 8 could not be written" in err
    assert "the checkpoint of step 4 is whole" in err
    assert find(run / "all").step_folder.name == "4"
    assert list(world.losses(run))[:8] == [("all", n) for n in range(1, 9)]
    assert "from its checkpoint of step 4" in train(run)
    assert world.losses(run) == world.losses(tmp_path / "whole")
