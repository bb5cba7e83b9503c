"""Configs on slices: what must hold before anyone pays for one."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("libtpu")
pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, pytest.mark.xdist_group("libtpu")]


def check(folder, *words):
    """The report of `vlmem compile`, in a process of its own, since libtpu stays locked as long as a process lives."""
    path = folder / "report.json"
    command = [sys.executable, "-m", "vlmem_jax", "compile", *words, "--no-remedies", "--json", str(path)]
    deadline = time.time() + 1500
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if "another process is compiling" not in done.stderr or time.time() > deadline:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_the_tiny_model_gathers_no_activations(tmp_path, topology):
    words = (
        "--config",
        "configs/tiny/comemo.py",
        "--topology",
        topology,
        "--packs",
        "1",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
    )
    assert check(tmp_path, *words)["activation_gathers"] == []


def test_comemo_2b_gathers_no_activations(tmp_path):
    # sharding is that of full packs; without the memory's kernels, compiling takes a fraction of the time
    short = ("--packs", "1", "--config.data.pack_tokens=2048", "--config.data.max_sample_tokens=2048")
    words = (*short, "--config.data.pack_tiles=4", "--config.model.attention.implementation=xla")
    report = check(tmp_path, "--config", "configs/comemo_2b.py", "--topology", "v5e:4x4", *words)
    assert report["activation_gathers"] == []
    assert report["hbm_share"] <= 0.90
