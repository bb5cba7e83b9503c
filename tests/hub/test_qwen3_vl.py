"""Released Qwen3-VL checkpoints: names, layouts, tied heads, JSON files, there and back."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.patches_world import save_tokenizer
from vlmem_jax import families
from vlmem_jax.config import to_dict
from vlmem_jax.families import qwen3_vl
from vlmem_jax.families.qwen3_vl import read_config, write_config, write_preprocessors
from vlmem_jax.generate import load_model
from vlmem_jax.hub.convert import export_folder, import_folder, load_folder, released
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.models import VLM
from vlmem_jax.processing import StepConfig
from vlmem_jax.trees import flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_vl"  # the set that is kept here
PREPROCESSOR = {
    "size": {"shortest_edge": 1024, "longest_edge": 100352}, "patch_size": 16, "temporal_patch_size": 2,
    "merge_size": 2, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip
VIDEOS = PREPROCESSOR | {"size": {"shortest_edge": 4096, "longest_edge": 204800}, "fps": 2, "max_frames": 32}


def tiny(changes):
    return families.resolve({"preset": "tiny_qwen3_vl", **changes})


def size_of(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_published_names_and_sizes():
    models = {name: families.resolve({"preset": f"qwen3_vl_{name}"}) for name in ("2b", "4b", "8b", "32b")}
    tables = {name: qwen3_vl.name_table(model) for name, model in models.items()}
    small, large = ({name: rule.shape for rule in tables[size] for name in rule.names} for size in ("4b", "8b"))
    assert (len(small), len(large)) == (713, 750) and "lm_head.weight" in large and "lm_head.weight" not in small
    assert large["model.visual.patch_embed.proj.weight"] == (1152, 3, 2, 16, 16)
    assert large["model.visual.pos_embed.weight"] == (2304, 1152)
    assert large["model.visual.blocks.26.attn.qkv.weight"] == (3456, 1152)
    assert large["model.visual.merger.norm.weight"] == (1152,)
    assert large["model.visual.deepstack_merger_list.2.norm.weight"] == (4608,)
    assert large["model.visual.deepstack_merger_list.0.linear_fc2.weight"] == (4096, 4608)
    assert small["model.language_model.layers.35.self_attn.q_proj.weight"] == (4096, 2560)
    assert small["model.language_model.layers.0.self_attn.k_norm.weight"] == (128,)
    parts = {name: VLM(model).abstract() for name, model in models.items()}
    seeing = {name: (size_of(tree["vision"]) + size_of(tree["projector"])) / 1e9 for name, tree in parts.items()}
    whole = {name: size_of(tree) / 1e9 for name, tree in parts.items()}
    assert {n: round(x, 3) for n, x in seeing.items()} == {"2b": 0.407, "4b": 0.415, "8b": 0.576, "32b": 0.595}
    assert {n: round(x, 3) for n, x in whole.items()} == {"2b": 2.128, "4b": 4.438, "8b": 8.767, "32b": 33.357}


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path, request):
    """The golden model in bf16 as a folder of Hugging Face, in the published layout or, if asked for, another."""
    folder = tmp_path / "hf"
    folder.mkdir()
    content = json.loads((GOLDEN / "config.json").read_text())
    content.pop("arrays"), content.pop("prompts")
    content["text_config"]["dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    prefixes = getattr(request, "param", qwen3_vl.PUBLISHED)
    weights = safetensors.numpy.load_file(GOLDEN / "checkpoint_hub_layout.safetensors")
    safetensors.numpy.save_file(
        {renamed(name, qwen3_vl.PUBLISHED, prefixes): x.astype(ml_dtypes.bfloat16) for name, x in weights.items()},
        folder / "model.safetensors",
    )
    return folder


def renamed(name, before, after):
    for old, new in zip(before, after, strict=True):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("hf_folder", qwen3_vl.LAYOUTS, indirect=True, ids=str)
def test_theirs_to_ours_to_theirs_is_bit_equal(hf_folder, tmp_path):
    summary = import_folder(hf_folder, tmp_path / "ours")
    assert not summary.fresh and not summary.new_rows and not summary.new_tokens
    assert not any("not read" in note for note in summary.notes)
    export_folder(tmp_path / "ours", tmp_path / "back")
    came, back = tensors(hf_folder), tensors(tmp_path / "back")
    came = {renamed(name, qwen3_vl.layout(came), qwen3_vl.PUBLISHED): x for name, x in came.items()}
    assert back.keys() == came.keys()
    for name, value in came.items():
        assert back[name].dtype == value.dtype and back[name].tobytes() == value.tobytes(), name
    assert released(tmp_path / "back") == released(hf_folder)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf_folder, tmp_path / "back"))
    for key, value in before.items():
        assert after[key] == (value if not isinstance(value, dict) else after[key] | value), key
    for name, wanted in (("preprocessor_config.json", PREPROCESSOR), ("video_preprocessor_config.json", VIDEOS)):
        assert wanted.items() <= json.loads((tmp_path / "back" / name).read_text()).items()


def test_limits_of_pixels_and_control_tokens_come_back(hf_folder, tmp_path):
    image = StepConfig(max_pixels=100352, budget="video", video_wrapper="outer", max_video_pixels=204800, fps=1.0)
    import_folder(hf_folder, tmp_path / "ours", image=image)
    save_tokenizer(tmp_path / "ours" / "tokenizer")
    export_folder(tmp_path / "ours", tmp_path / "hf2")
    import_folder(tmp_path / "hf2", tmp_path / "back")
    loaded = load_model(tmp_path / "back")
    assert loaded.processor.image == image
    written = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert written["video_token_id"] == loaded.processor.video_id


def test_files_of_newer_libraries_are_one(hf_folder):
    pixels = {"image_processor": PREPROCESSOR, "video_processor": VIDEOS}
    old = released(hf_folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (hf_folder / name).unlink()
    (hf_folder / "processor_config.json").write_text(json.dumps(pixels))
    assert released(hf_folder) == old
    assert (old.image.max_pixels, old.image.max_video_pixels, old.image.max_frames) == (100352, 204800, 32)


def test_fresh_memory_blocks_on_a_released_checkpoint(hf_folder, tmp_path):
    found = to_dict(released(hf_folder).model)
    blocks = dict(kind="comemo", every=2, heads=2, head_dim=found["decoder"]["head_dim"], mlp_width=40)
    model = families.resolve(found | {"memory": blocks})
    summary = import_folder(hf_folder, tmp_path / "ours", model=model)
    assert summary.fresh and all(path.startswith("memory/") for path in summary.fresh)
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert "model.language_model.layers.1.gated_cross_attn_layer.attn_gate" in tensors(tmp_path / "back")
    assert released(tmp_path / "back").model.memory == model.memory


@pytest.mark.parametrize("at_top", [True, False])
def test_an_untied_model_needs_its_head(hf_folder, tmp_path, at_top):
    """What the text's section says of it is no guide: newer libraries write it of untied models, too."""
    content = json.loads((hf_folder / "config.json").read_text())
    content["text_config"]["tie_word_embeddings"] = True
    if not at_top:
        del content["tie_word_embeddings"]
    (hf_folder / "config.json").write_text(json.dumps(content))
    assert not released(hf_folder).model.decoder.tied
    weights = tensors(hf_folder)
    del weights["lm_head.weight"]
    safetensors.numpy.save_file(weights, hf_folder / "model.safetensors")
    if at_top:
        with pytest.raises(ValueError, match="missing: lm_head.weight"):
            import_folder(hf_folder, tmp_path / "ours")
    else:
        assert released(hf_folder).model.decoder.tied


def test_straight_into_arrays(hf_folder):
    vlm = VLM(released(hf_folder).model)
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params = load_folder(hf_folder, vlm, jax.tree.map(lambda _: cpu, vlm.abstract()))
    expected = from_arrays(vlm.config, tensors(hf_folder))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(expected)[path], strict=True)


# --- JSON files -------------------------------------------------------------------------------------------------------

RELEASED = {
    "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16",
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728,
        "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True, "use_cache": True, "vocab_size": 151936,
    },
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1024,
        "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl", "num_heads": 16,
        "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}  # fmt: skip
"""As the 4B model was released, whose heads are wider than its width by their number."""


def changed(key, value):
    content = json.loads(json.dumps(RELEASED))
    *section, name = key.split(".")
    (content[section[0]] if section else content)[name] = value
    return content


def test_a_released_config():
    found = read_config(RELEASED, {})
    assert found.model == families.resolve({"preset": "qwen3_vl_4b"})
    assert found.image == StepConfig()


def test_newer_files():
    text = dict(RELEASED["text_config"])
    text["rope_parameters"] = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
    assert read_config(RELEASED | {"text_config": text}, {}) == read_config(RELEASED, {})


@pytest.mark.parametrize("changes", [{}, {"decoder": {"tied": False}}, {"memory": "comemo"}, {"memory": "vismem"}])
def test_what_is_written_is_read_again(changes):
    model = tiny(changes)
    image = StepConfig(min_pixels=64, max_pixels=4096, context="pooled:2", fps=1.0, budget="capped")
    files = list(write_preprocessors(model, image).values())
    found = read_config(write_config(model, "float32"), {}, files[0] | {"video_processor": files[1]})
    assert found.model == model and found.image == image


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("text_config.hidden_act", "gelu", "text_config.hidden_act must be 'silu', got 'gelu'"),
        ("text_config.attention_bias", True, "text_config.attention_bias must be False, got True"),
        ("vision_config.hidden_act", "gelu", "vision_config.hidden_act must be 'gelu_pytorch_tanh', got 'gelu'"),
        ("text_config.rope_scaling", {"rope_type": "yarn", "mrope_section": [24, 20, 20]}, "the values default"),
        ("text_config.rope_scaling", {"mrope_section": [24, 20, 20], "mrope_interleaved": False}, "the values default"),
        ("text_config.rope_scaling", None, "rope_scaling of config.json must have mrope_section"),
        ("text_config.rope_theta", None, "config.json must have text_config.rope_theta"),
        ("text_config.head_dim", None, "config.json must have text_config.head_dim"),
        ("vision_config.depth", None, "config.json must have vision_config.depth"),
        ("vision_config.num_position_embeddings", 2300, "num_position_embeddings .* must be a square, got 2300"),
        ("vision_config.out_hidden_size", 2048, "must be text_config.hidden_size 2560, got 2048"),
        ("vision_config.deepstack_visual_indexes", [5, 24], r"deep_layers must rise within 0 to 23, got \(5, 24\)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_names_its_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(changed(key, value), {})
