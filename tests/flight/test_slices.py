"""Configs on slices: what must hold before anyone pays for one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("libtpu")
pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow, pytest.mark.xdist_group("libtpu")]

# packs so many that activations are not too small to be flagged
TINY = ("--config", "configs/tiny/comemo.py", "--packs", "16", "--config.mesh.data=1", "--config.mesh.fsdp=-1")


def check(folder, topology, *words, before="pass"):
    """The report of `vlmem compile`, in a process of its own, since libtpu stays locked as long as a process lives."""
    path = folder / "report.json"
    program = f"{before}; import sys; from vlmem_jax.cli.main import main; sys.exit(main())"
    words = ("compile", "--topology", topology, *words, "--no-remedies", "--json", str(path))
    # the partitioner makes the exchanges; what hides them takes most of the time to compile
    environment = os.environ | {"JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1"}
    deadline = time.time() + 1500
    while True:
        command = [sys.executable, "-c", program, *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if "another process is compiling" not in done.stderr or time.time() > deadline:
            break
        time.sleep(3)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_the_tiny_model_gathers_no_activations(tmp_path, topology):
    assert check(tmp_path, topology, *TINY)["activation_gathers"] == []


def test_tiles_that_each_device_works_on_again_would_be_caught(tmp_path):
    wrong = "from vlmem_jax.sharding import LOGICAL_AXES; LOGICAL_AXES.update(parts=None)"
    assert check(tmp_path, "v5p:2x2x1", *TINY, before=wrong)["activation_gathers"]


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x1"])
def test_comemo_2b_gathers_no_activations(tmp_path, topology):
    # sharding is that of full packs; arrays of 1280 tokens or 5 tiles have a factor 5, which sizes of weights lack
    short = ("--packs", "1", "--config.data.pack_tokens=1280", "--config.data.max_sample_tokens=1280")
    words = (*short, "--config.data.pack_tiles=5", "--config.model.attention.implementation=xla")
    report = check(tmp_path, topology, "--config", "configs/comemo_2b.py", *words)
    assert report["activation_gathers"] == []
    assert report["hbm_share"] <= 0.90
