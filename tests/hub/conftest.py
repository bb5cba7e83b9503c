"""A released checkpoint in small: the golden CoMemo weights as a Hugging Face folder."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

GOLDEN = Path(__file__).parents[1] / "golden" / "comemo"  # the set that is kept here: tests name its sizes


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """The golden weights by their Hugging Face name."""
    arrays = np.load(GOLDEN / "full_model.npz")
    return {key[2:]: arrays[key] for key in arrays if key.startswith("w/")}


@pytest.fixture(scope="session")
def released_config() -> dict:
    content = json.loads((GOLDEN / "config.json").read_text())
    size = content["vision_config"]["image_size"]
    return content | {"force_image_size": size, "max_dynamic_patch": 12, "auto_map": {"AutoConfig": "theirs.Config"}}


@pytest.fixture
def hf_folder(tmp_path, weights, released_config) -> Path:
    """bf16, two shards with an index."""
    folder = tmp_path / "hf"
    write_hf(folder, {name: value.astype(ml_dtypes.bfloat16) for name, value in weights.items()}, released_config)
    return folder


@pytest.fixture
def plain_folder(tmp_path, weights, released_config) -> Path:
    """The same without memory blocks and their extra name level, as InternVL2 is released, in one file."""
    plain = {name.replace(".decoder_layer.", "."): w for name, w in weights.items() if "gated_cross_attn" not in name}
    folder = tmp_path / "plain"
    content = {key: value for key, value in released_config.items() if key != "mixin_config"}
    write_hf(folder, plain, content, shards=1)
    return folder


def write_hf(folder: Path, tensors: dict[str, np.ndarray], config: dict, shards: int = 2) -> None:
    """A Hugging Face folder written by the reference library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"pad_token": "</s>"}')
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    files = {}
    for i in range(shards):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        safetensors.numpy.save_file(part, folder / name)
        files |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
