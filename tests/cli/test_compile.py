"""`vlmem compile`: a training step for TPUs that are not there."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("libtpu")
pytestmark = [pytest.mark.tpu_aot, pytest.mark.xdist_group("libtpu")]


def compile_step(*words):
    """Runs the command in a process of its own, since libtpu stays locked as long as a process lives."""
    command = [sys.executable, "-m", "vlmem_jax", "compile", *words]
    deadline = time.time() + 600
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if "another process is compiling" not in done.stderr or time.time() > deadline:
            return done
        time.sleep(3)


def test_the_numbers_are_printed_and_written(tmp_path):
    path = tmp_path / "numbers.json"
    done = compile_step("--config", "configs/tiny/comemo.py", "--topology", "v5e:2x2", "--json", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(path.read_text())
    assert numbers["stage"] == "finetune"
    assert min(numbers[key] for key in ("argument_bytes", "temp_bytes", "peak_bytes")) > 0
    assert 0 < numbers["hbm_share"] < 0.5
    assert 0 < numbers["predicted_step_seconds"] <= numbers["exposed_step_seconds"]
    assert 0 < numbers["predicted_mfu"] < 1
    assert numbers["collectives"] and numbers["activation_gathers"] == []
    assert "predicted, not measured" in done.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (["--topology", "v5e:3x5"], "there is no slice v5e:3x5"),
        (["--topology", "v4:2x2"], "a topology is one of v5e, v5p, v6e, a colon and sizes"),
        (["--topology", "v5e:2x2", "--stage", "warmup"], "there is no stage 'warmup'; the experiment has pretrain"),
        (["--topology", "v5e:2x2", "--config.mesh.tensor=3"], "the mesh must use all 4 devices"),
    ],
)
def test_what_does_not_fit_is_one_plain_line(words, message):
    done = compile_step("--config", "configs/tiny/comemo.py", *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
