"""Files beside the tensors of a Hugging Face folder are read, carried along, or named."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from tests.hub.test_qwen2_5_vl import PREPROCESSOR
from tests.hub.test_qwen2_5_vl import hf_folder as golden_folder
from tests.patches_world import save_tokenizer
from vlmem_jax.hub.convert import export_folder, import_folder, released

hf_folder = golden_folder
"""The fixture of the golden Qwen2.5-VL, in place of that of the folder's conftest."""
SMALL = {
    "generation_config.json": '{"temperature": 0.1}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "merges.txt": "#version: 0.2\n",
    "vocab.json": "{}",
}


def test_small_files_that_came_go_back_out(hf_folder, tmp_path):
    save_tokenizer(hf_folder)
    for name, content in SMALL.items():
        (hf_folder / name).write_text(content)
    import_folder(hf_folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    for name, content in SMALL.items():
        assert (tmp_path / "back" / name).read_text() == content, name


def test_a_rate_of_frames_that_is_whole_goes_out_as_it_came(hf_folder, tmp_path):
    import_folder(hf_folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    rate = json.loads((tmp_path / "back" / "config.json").read_text())["vision_config"]["tokens_per_second"]
    assert type(rate) is int


def test_the_image_processor_of_newer_files(hf_folder):
    (hf_folder / "preprocessor_config.json").unlink()
    size = {"shortest_edge": 1024, "longest_edge": 2048}
    newer = PREPROCESSOR | {"size": size, "min_pixels": 1, "max_pixels": 2, "image_mean": [0.1, 0.2, 0.3]}
    (hf_folder / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    found = released(hf_folder)
    assert (found.image.min_pixels, found.image.max_pixels) == (1024, 2048)
    assert found.model.vision.pixel_mean == (0.1, 0.2, 0.3)


def test_files_that_are_not_read_are_named(hf_folder, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "modeling_theirs.py"):
        (hf_folder / name).write_text("{}")
    (hf_folder / "README.md").write_text("x")
    summary = import_folder(hf_folder, tmp_path / "ours")
    names = "adapter_config.json", "adapter_model.safetensors", "modeling_theirs.py", "pytorch_model.bin"
    assert summary.unused == names


def test_an_adapter_alone_is_named_for_what_it_is(hf_folder, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"is an adapter \(LoRA\) without its model; convert the model, with --adapter"
    ):
        released(tmp_path / "lora")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named(hf_folder, tmp_path, bad, name):
    weights = safetensors.numpy.load_file(hf_folder / "model.safetensors")
    weights[name] = weights[name].copy()
    weights[name].reshape(-1)[1] = bad
    safetensors.numpy.save_file(weights, hf_folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"tensor {name} holds numbers that are not finite"):
        import_folder(hf_folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "change", [{"vision_config": None}, {"vision_config": 3}, {"hidden_size": None}, {"rope_scaling": []}]
)
def test_values_of_another_kind_are_a_plain_error(hf_folder, change):
    content = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match="config.json"):
        released(hf_folder)


def test_a_tokenizer_that_cannot_be_read_is_not_left_out(hf_folder, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (hf_folder / name).write_text("{}")
    with pytest.raises(ValueError, match="as vocab.json and merges.txt alone, which make no tokenizer.json"):
        import_folder(hf_folder, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours", ignore_errors=True)
