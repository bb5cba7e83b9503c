"""Configs on slices: what must hold before anyone pays for one."""

import pytest

from tests.flight.command import compile_step
from vlmem_jax.runtime.sharding import LOGICAL_AXES

pytest.importorskip("libtpu")
pytestmark = [pytest.mark.tpu_aot, pytest.mark.slow]

# packs so many that activations are not too small to be flagged
TINY = ("--config", "configs/tiny/comemo.py", "--packs", "16", "--config.mesh.data=1", "--config.mesh.fsdp=-1")
# two layers, each with a memory block: they are scanned
TINY += ("--config.model.decoder.layers=2", "--config.model.memory.every=1", "--no-code", "--no-remedies")


def check(folder, topology, *words, before=None):
    done = compile_step(folder, "--topology", topology, *words, before=before)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
    return done.report


def test_the_tiny_model_gathers_no_activations(tmp_path):
    assert check(tmp_path, "v5p:2x2x1", *TINY)["activation_gathers"] == []


def do_not_split_tiles():
    LOGICAL_AXES.update(parts=None)


def test_tiles_that_each_device_works_on_again_would_be_caught(tmp_path):
    adam = "--config.optimizer.name=adamw"  # of few operations
    assert check(tmp_path, "v5p:2x2x1", *TINY, adam, before=do_not_split_tiles)["activation_gathers"]


def test_comemo_2b_gathers_no_activations(tmp_path):
    # sharding is that of full packs; arrays of 1280 tokens or 5 tiles have a factor 5, which sizes of weights lack
    short = ("--packs", "1", "--config.data.pack_tokens=1280", "--config.data.max_sample_tokens=1280")
    words = (*short, "--config.data.pack_tiles=5", "--config.model.attention.implementation=xla")
    report = check(tmp_path, "v5e:4x4", "--config", "configs/comemo_2b.py", *words, "--no-code", "--no-remedies")
    assert report["activation_gathers"] == []
    assert report["hbm_share"] <= 0.90
