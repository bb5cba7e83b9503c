"""Commands on a bucket: a server in this process stands for Google Cloud Storage."""

import contextlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.cli.test_train import ONE_STAGE, start
from tests.train import world
from vlmem_jax import families
from vlmem_jax.checkpoint import find, load_params
from vlmem_jax.cli.main import main
from vlmem_jax.hub.convert import export_folder
from vlmem_jax.models import VLM
from vlmem_jax.paths import as_path

pytestmark = pytest.mark.usefixtures("one_device")  # checkpoint/test_bucket.py has meshes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


KILLED_IN_STEP_7 = """
    import os, time
    from vlmem_jax.paths import as_path
    from vlmem_jax.train.metrics import Recorder
    record = Recorder.step
    def step(self, n, *numbers):
        record(self, n, *numbers)
        if n == 7:
            while not as_path("gs://bucket/run/all/4/commit_success.txt").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), 9)
    Recorder.step = step
"""


@pytest.fixture(scope="module")
def runs(folder, gcs, one_device):
    """Workdirs of the same run of one stage, in a bucket, killed there and called again, and on a disk, at one go."""
    places = "gs://bucket/run", str(folder / "run")
    file = world.config_file(folder, **ONE_STAGE)
    killed = start(file, places[0], script=KILLED_IN_STEP_7)
    assert killed.wait() == -9, killed.stderr.read()
    assert find(places[0]).step_folder.name == "4"
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for place in places:
            assert main(["train", "--config", str(file), "--workdir", place]) == 0
    assert "from its checkpoint of step 4" in said.getvalue()
    return places


@pytest.fixture
def run(runs):
    """The one in the bucket."""
    return runs[0]


def params(path):
    checkpoint = find(path)
    model = VLM(families.resolve(checkpoint.model["model"]))
    return load_params(checkpoint.step_folder, model.abstract())


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_in_a_bucket_that_is_killed_goes_on_and_leaves_what_a_disk_would_hold(runs, gcs):
    run, disk = runs[0], Path(runs[1])
    assert_equal(params(run), params(disk))
    assert world.losses(as_path(run)) == world.losses(disk)
    assert find(run).model == find(disk).model

    def names(paths):  # of what both should hold; how arrays lie in files is TensorStore's business
        return {name for name in paths if "/d/" not in name and "ocdbt" not in name and "tfevents" not in name}

    there = {name.removeprefix("run/") for name in gcs.names("bucket", "run/")}
    here = {path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()}
    assert names(there) - names(here) <= {name for name in there if name.endswith("commit_success.txt")}
    assert names(here) <= names(there)
    assert any("tensorboard/events" in name for name in there) and any(name.endswith(".plan") for name in there)


def test_a_run_starts_from_a_bucket_and_answers_from_it(run, folder, tmp_path, capsys):
    line = ["--config", str(folder / "config.py"), "--workdir", str(tmp_path), f"--config.init={run}"]
    assert main(["train", *line, "--config.stages.all.steps=1"]) == 0
    assert "1 steps from gs://bucket/run/all/9" in capsys.readouterr().out
    image = ["--image", str(folder / "0.png"), "--prompt", "Say a word.", "--max-new-tokens", "3"]
    assert main(["generate", "--checkpoint", run, *image]) == 0
    assert main(["generate", "--checkpoint", run + "/all/9", *image]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_checkpoint_goes_from_a_disk_to_a_bucket_and_back(run, tmp_path, bucket, capsys):
    assert main(["convert", run, str(tmp_path / "hf")]) == 0
    assert main(["convert", str(tmp_path / "hf"), bucket]) == 0
    assert_equal(params(bucket), params(run))
    assert main(["convert", bucket, str(tmp_path / "again")]) == 0
    for one in (tmp_path / "hf").iterdir():
        assert (tmp_path / "again" / one.name).read_bytes() == one.read_bytes() or one.name == "config.json"
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "hf" / "config.json").read_text()
    )
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), bucket]) == 2
    assert f"{bucket} exists already; name a new folder" in capsys.readouterr().err


def test_a_conversion_that_fails_leaves_nothing_in_the_bucket(run, tmp_path, gcs, bucket, capsys):
    export_folder(run, tmp_path / "hf")
    gcs.refuse = lambda name: name.endswith("model.json")
    assert main(["convert", str(tmp_path / "hf"), bucket]) == 2
    assert "Forbidden" in capsys.readouterr().err
    assert not gcs.names("bucket", bucket.removeprefix("gs://bucket/"))


def test_hugging_face_folders_are_on_disks(run, bucket, capsys):
    assert main(["convert", run, bucket]) == 2
    assert f"is written to a disk; got {bucket}" in capsys.readouterr().err
    assert main(["convert", bucket, "gs://bucket/other"]) == 2
    assert "must lie on a disk" in capsys.readouterr().err


def test_an_evaluation_is_kept_in_a_bucket_and_answers_as_generate_does(run, folder, bucket, capsys):
    prompts = [{"prompt": "a", "image": "2.png", "answer": "b"}, {"prompt": "c d", "images": ["1.png", "3.png"]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = "--checkpoint", run, "--max-new-tokens", "6", "--rope-dhr", "off"
    for done in (0, 2):
        assert main(["evaluate", *flags, "--data", str(folder / "prompts.jsonl"), "--output", bucket]) == 0
        assert f"samples.jsonl: {done} of 2 prompts are there" in capsys.readouterr().err
    lines = [json.loads(line) for line in (as_path(bucket) / "samples.jsonl").read_text().splitlines()]
    assert json.loads((as_path(bucket) / "summary.json").read_text())["samples"] == len(lines) == 2
    outputs = {line["id"]: line["output"] for line in lines}
    for n, prompt in enumerate(prompts):
        names = prompt.get("images") or [prompt["image"]]
        images = [word for name in names for word in ("--image", str(folder / name))]
        assert main(["generate", *flags, "--prompt", prompt["prompt"], *images]) == 0
        assert capsys.readouterr().out == outputs[str(n)] + "\n"
