"""Checkpoints of tiny models with the weights of the golden files, and what was recorded of them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy


def tiny(golden, folder, kind):
    """A folder as it is released, its tensors, and images with what was recorded of them."""
    tensors, io = (dict(np.load(golden / "geometry" / f"{kind}_{what}.npz")) for what in ("weights", "io"))
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    about = json.loads((golden / "geometry" / f"{kind}_config.json").read_text())
    images = np.ascontiguousarray(io["images"][0].transpose(0, 2, 3, 1))
    return SimpleNamespace(folder=folder, tensors=tensors, io=io, about=about, images=images)


@pytest.fixture(scope="session")
def pi3_checkpoint(golden, tmp_path_factory):
    return tiny(golden, tmp_path_factory.mktemp("geometry") / "pi3", "pi3")


@pytest.fixture(scope="session")
def vggt_checkpoint(golden, tmp_path_factory):
    return tiny(golden, tmp_path_factory.mktemp("geometry") / "vggt", "vggt")
