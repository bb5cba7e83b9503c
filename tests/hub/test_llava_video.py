"""LLaVA-Video's folders in and out: names, config.json, tensors that nothing reads, the frame's placeholder."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from tests.patches_world import save_tokenizer
from vlmem_jax.cli.main import main
from vlmem_jax.families import resolve
from vlmem_jax.families.llava_video import NEWLINES, TOWER, TOWERS, read_config
from vlmem_jax.hub.convert import export_folder, import_folder, released
from vlmem_jax.models import VLM
from vlmem_jax.processing import Tokenizer
from vlmem_jax.processing.chat import FRAME


@pytest.fixture(scope="module")
def weights(golden):
    return dict(np.load(golden / "llava_video" / "weights.npz"))


@pytest.fixture(scope="module")
def content(golden):
    about = json.loads((golden / "llava_video" / "config.json").read_text())
    tower, text = about["siglip"], about["qwen2"]
    return {
        "model_type": "llava_qwen", "torch_dtype": "float32", "hidden_size": text["hidden"],
        "intermediate_size": text["intermediate"], "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"], "num_key_value_heads": text["kv_heads"], "vocab_size": text["vocab"],
        "rms_norm_eps": text["rms_eps"], "rope_theta": text["rope_theta"], "tie_word_embeddings": text["tie"],
        "max_position_embeddings": 512, "mm_vision_tower": "somebody/tower", "mm_spatial_pool_mode": "bilinear",
        "mm_newline_position": "grid", "add_time_instruction": False, "force_sample": True, "image_aspect_ratio": "any",
        "vision_config": {"num_attention_heads": tower["heads"], "image_size": tower["image_size"]},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, weights, content):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    save_tokenizer(folder, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    return folder


def test_a_folder_comes_back_bit_for_bit_with_what_nothing_reads(folder, tmp_path, weights, content):
    summary = import_folder(folder, tmp_path / "ours")
    assert summary.new_tokens == (FRAME,) and not summary.fresh and not summary.new_rows
    export_folder(tmp_path / "ours", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys() and any("post_layernorm" in name for name in back)
    assert all(back[name].tobytes() == value.tobytes() for name, value in weights.items())
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in content if key != "vision_config"} == {
        key: value for key, value in content.items() if key != "vision_config"
    }
    assert released(tmp_path / "back") == released(folder)


def test_the_placeholder_of_frames_takes_the_first_free_id(folder, tmp_path):
    before = Tokenizer.load(folder).vocab_size
    import_folder(folder, tmp_path / "ours")
    assert Tokenizer.load(tmp_path / "ours" / "tokenizer").id(FRAME) == before


def test_layers_behind_the_last_that_runs_are_kept_and_not_run(folder, tmp_path, weights):
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in weights if name.startswith(TOWER + "encoder"))
    more = {name.replace(f"layers.{last}.", f"layers.{last + 1}."): 2 * x for name, x in weights.items()
            if name.startswith(f"{TOWER}encoder.layers.{last}.")}  # fmt: skip
    safetensors.numpy.save_file(weights | more, folder / "model.safetensors")
    about = json.loads((folder / "config.json").read_text())
    about["vision_config"]["num_hidden_layers"] = last + 1
    (folder / "config.json").write_text(json.dumps(about))
    assert released(folder).model.vision.layers == last + 1
    import_folder(folder, tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == (weights | more).keys()


@pytest.fixture
def apart(folder, tmp_path, weights):
    """The checkpoint without its tower, and the tower, with a layer more, in a folder of its own."""
    tower = {name: x for name, x in weights.items() if name.startswith(TOWER)}
    safetensors.numpy.save_file(
        {name: x for name, x in weights.items() if name not in tower}, folder / "model.safetensors"
    )
    last = max(int(name.split("layers.")[1].split(".")[0]) for name in tower if "layers." in name)
    more = {name.replace(f"layers.{last}.", f"layers.{last + 1}."): x for name, x in tower.items()}
    own = {"vision_model." + name.removeprefix(TOWER): x for name, x in (more | tower).items()}
    (tmp_path / "siglip").mkdir()
    safetensors.numpy.save_file(
        own | {"logit_scale": np.ones(1, np.float32)}, tmp_path / "siglip" / "model.safetensors"
    )
    about = json.loads((folder / "config.json").read_text())
    about["vision_config"]["num_hidden_layers"] = last + 1
    (folder / "config.json").write_text(json.dumps(about))
    return folder, tmp_path / "siglip"


def test_a_tower_may_come_from_a_folder_of_its_own(apart, tmp_path, weights):
    folder, tower = apart
    with pytest.raises(ValueError, match="lacks its vision tower; convert it with --vision FOLDER"):
        import_folder(folder, tmp_path / "ours")
    assert main(["convert", str(folder), str(tmp_path / "ours"), "--vision", str(tower)]) == 0
    export_folder(tmp_path / "ours", tmp_path / "back")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert weights.keys() < back.keys()  # the layer more is kept, and not read
    assert all(back[name].tobytes() == value.tobytes() for name, value in weights.items())


def test_the_released_config_names_its_tower(content, weights):
    [name] = TOWERS
    shapes = {f"{TOWER}embeddings.position_embedding.weight": (729, 1152)}
    shapes |= {f"{TOWER}embeddings.patch_embedding.weight": (1152, 3, 14, 14)}
    shapes |= {f"{TOWER}encoder.layers.{n}.mlp.fc1.weight": (4304, 1152) for n in range(26)}
    about = {key: value for key, value in content.items() if key != "vision_config"} | {"mm_vision_tower": name}
    vision = read_config(about, shapes).model.vision
    assert (vision.width, vision.layers, vision.heads, vision.mlp_width) == (1152, 26, 16, 4304)
    assert (vision.image_size, vision.grid, vision.tile.tokens) == (384, 27, 210)


def test_the_released_size():
    parts = VLM(resolve({"preset": "llava_video_7b"})).abstract()
    count = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in parts.items()}
    layer = 4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert count["vision"] == 26 * layer + 729 * 1152 + (14 * 14 * 3 + 1) * 1152
    assert count["projector"] == 1153 * 3584 + 3585 * 3584 + 3584
    assert count["decoder"] == 7_615_616_512  # Qwen2-7B's


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vision_config": {}},
            "must have vision_config.num_attention_heads, or name in mm_vision_tower one of google/",
        ),
        (
            {"mm_newline_position": "one_token"},
            "mm_newline_position of config.json must be one of grid, frame, no_token",
        ),
        ({"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu', got 'linear'"),
        ({"rms_norm_eps": None}, "config.json must have rms_norm_eps"),
        ({"mm_spatial_pool_mode": "median"}, "pool"),
    ],
)
def test_what_is_missing_or_not_supported_is_named(folder, change, words):
    about = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=words):
        released(folder)


@pytest.mark.parametrize(("theirs", "ours"), NEWLINES.items())
def test_newlines_go_both_ways(content, weights, theirs, ours):
    shapes = {name: x.shape for name, x in weights.items()}
    assert read_config(content | {"mm_newline_position": theirs}, shapes).model.vision.newline == ours
