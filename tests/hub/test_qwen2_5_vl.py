"""Released Qwen2.5-VL checkpoints: names, both layouts, tied heads, memory blocks, JSON files, there and back."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from tests.patches_world import save_tokenizer
from vlmem_jax import families
from vlmem_jax.config import to_dict
from vlmem_jax.families import qwen2_5_vl
from vlmem_jax.families.qwen2_5_vl import read_config, write_config, write_preprocessor
from vlmem_jax.generate import load_model
from vlmem_jax.hub.convert import export_folder, import_folder, load_folder, released
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.orbax_io import read_leaves
from vlmem_jax.models import VLM
from vlmem_jax.processing import PatchConfig, Tokenizer
from vlmem_jax.trees import flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen2_5_vl"  # the set that is kept here
VISION = {"memory": {"kind": "vismem", "former": "lora_vision", "vision_layer": 1}}
VARIANTS = [
    {}, {"decoder": {"tied": False}}, {"memory": "comemo", "decoder": {"tied": False}}, {"memory": "vismem"}, VISION,
]  # fmt: skip
PREPROCESSOR = {"min_pixels": 3136, "max_pixels": 100352, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]}


def tiny(changes):
    return families.resolve({"preset": "tiny_qwen2_5_vl", **changes})


def test_published_names():
    tables = {name: qwen2_5_vl.name_table(families.resolve({"preset": f"qwen2_5_vl_{name}"})) for name in ("3b", "7b")}
    small, large = ({name: rule.shape for rule in table for name in rule.names} for table in tables.values())
    assert len(large) == 729 and "lm_head.weight" in large and "lm_head.weight" not in small
    assert large["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)
    assert large["visual.blocks.31.attn.qkv.weight"] == (3840, 1280)
    assert large["visual.merger.mlp.2.weight"] == (3584, 5120)
    assert large["model.layers.27.self_attn.k_proj.bias"] == (512,)
    assert small["model.embed_tokens.weight"] == (151936, 2048)


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path, request):
    """The golden model in bf16 as a folder of Hugging Face, in the published layout or, if asked for, the newer."""
    folder = tmp_path / "hf"
    folder.mkdir()
    content = json.loads((GOLDEN / "config.json").read_text())
    content.pop("arrays")
    weights = {name: value.astype(ml_dtypes.bfloat16) for name, value in np.load(GOLDEN / "weights.npz").items()}
    if getattr(request, "param", "published") == "published":
        names = json.loads((GOLDEN / "weight_keys.json").read_text())
        weights = {names[name][0]: value for name, value in weights.items()}
        content |= content.pop("text_config")
    content |= {"model_type": "qwen2_5_vl", "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "theirs.Config"}}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return folder


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def parameters(folder):
    return {path: leaf.read(()) for path, leaf in read_leaves(folder / "0" / "params").items()}


@pytest.mark.parametrize("hf_folder", ["published", "newer"], indirect=True)
def test_theirs_to_ours_to_theirs_is_bit_equal(hf_folder, tmp_path):
    summary = import_folder(hf_folder, tmp_path / "ours")
    assert not summary.fresh and not summary.new_rows and not summary.new_tokens
    export_folder(tmp_path / "ours", tmp_path / "back")
    names = json.loads((GOLDEN / "weight_keys.json").read_text())
    wanted = {names.get(name, [name])[0]: value for name, value in tensors(hf_folder).items()}
    found = tensors(tmp_path / "back")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes(), name
    assert released(tmp_path / "back") == released(hf_folder)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (hf_folder, tmp_path / "back"))
    for key, value in before.items():
        assert after[key] == (value if not isinstance(value, dict) else after[key] | value), key
    written = json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())
    assert PREPROCESSOR.items() <= written.items()


def test_control_tokens_and_limits_of_pixels_come_back(hf_folder, tmp_path):
    import_folder(hf_folder, tmp_path / "ours", image=PatchConfig(max_pixels=100352))
    save_tokenizer(tmp_path / "ours" / "tokenizer")
    export_folder(tmp_path / "ours", tmp_path / "hf2")
    import_folder(tmp_path / "hf2", tmp_path / "back")
    loaded = load_model(tmp_path / "back")
    written = json.loads((tmp_path / "hf2" / "config.json").read_text())
    assert written["image_token_id"] == loaded.processor.context_id
    assert loaded.processor.image == PatchConfig(max_pixels=100352)


def test_fresh_memory_blocks_on_a_released_checkpoint(hf_folder, tmp_path):
    found = to_dict(released(hf_folder).model)
    blocks = dict(kind="comemo", every=2, heads=2, head_dim=found["decoder"]["head_dim"], mlp_width=40)
    model = families.resolve(found | {"memory": blocks})
    summary = import_folder(hf_folder, tmp_path / "ours", model=model)
    assert set(summary.fresh) == {path for path in parameters(tmp_path / "ours") if path.startswith("memory/")}
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert "model.layers.1.gated_cross_attn_layer.attn_gate" in tensors(tmp_path / "back")
    assert released(tmp_path / "back").model.memory == model.memory


def test_a_fresh_memory_whose_tokens_start_from_one_of_a_released_checkpoint(hf_folder, tmp_path):
    found = to_dict(released(hf_folder).model)
    memory = to_dict(tiny({"memory": "vismem"}).memory) | {
        "token_ids": (310, 311, 312, 313),
        "start_id": 5,
        "memory_output": "rescaled",
    }
    model = families.resolve(found | {"memory": memory})
    save_tokenizer(hf_folder)
    summary = import_folder(hf_folder, tmp_path / "ours", model=model)
    made = parameters(tmp_path / "ours")
    assert set(summary.fresh) == {path for path in made if path.startswith("memory/")}
    rows = {"special_in": made["decoder/embed"][5], "special_out": made["decoder/head/kernel"][:, 5]}
    for name, row in rows.items():
        apart = made[f"memory/{name}"].astype(np.float32) - row.astype(np.float32)
        assert 0 < np.abs(apart).max() < 0.01
    assert not made["memory/short/lora/q/b"].any() and made["memory/short/lora/q/a"].any()
    sizes = np.sqrt((made["decoder/embed"].astype(np.float32) ** 2).mean(-1))
    np.testing.assert_allclose(made["memory/long/gain"].astype(np.float32), sizes.mean(), rtol=1e-2)
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert "vismem.short.lora.q.a" in tensors(tmp_path / "back")
    assert released(tmp_path / "back").model.memory == model.memory
    before = Tokenizer.load(hf_folder).encode("ab<|im_end|>")
    for folder in (tmp_path / "ours" / "tokenizer", tmp_path / "back"):
        assert Tokenizer.load(folder).encode("ab<|im_end|><ml_I><ms_E>") == [*before, 312, 311]
    save_tokenizer(tmp_path / "ours" / "tokenizer")  # as a run keeps it: without them
    assert load_model(tmp_path / "ours").processor.tokenizer.encode("ab<ml_I>")[2:] == [312]


def test_new_rows_of_a_tied_table(tmp_path):
    model = tiny({})
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), VLM(model).fresh(jax.random.key(3)))
    rules = {rule.ours: rule for rule in qwen2_5_vl.name_table(model)}
    (tmp_path / "hf").mkdir()
    stored = {}
    for path, leaf in flatten(params).items():
        rule = rules[path]
        for n, name in enumerate(rule.names):
            stored[name] = np.zeros(rule.shape, ml_dtypes.bfloat16)
            view = rule.view(stored[name])
            view[...] = np.asarray(leaf[n] if rule.stacked else leaf).reshape(view.shape)
    safetensors.numpy.save_file(stored, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(write_config(model, "bfloat16")))
    larger = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, vocab=model.decoder.vocab + 4))
    summary = import_folder(tmp_path / "hf", tmp_path / "ours", model=larger)
    assert summary.new_rows == 4 and not summary.fresh
    embed = parameters(tmp_path / "ours")["decoder/embed"]
    assert embed.shape[0] == model.decoder.vocab + 4 and embed[-4:].astype(np.float32).std() > 0
    np.testing.assert_array_equal(embed[:-4], params["decoder"]["embed"])


def test_a_tied_head_may_stand_beside_the_table(hf_folder, tmp_path):
    """Some libraries write both; the table is what counts."""
    content = json.loads((hf_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (hf_folder / "config.json").write_text(json.dumps(content))
    import_folder(hf_folder, tmp_path / "ours")
    assert "decoder/head/kernel" not in parameters(tmp_path / "ours")
    export_folder(tmp_path / "ours", tmp_path / "back")
    assert tensors(hf_folder).keys() - tensors(tmp_path / "back").keys() == {"lm_head.weight"}


def test_straight_into_arrays(hf_folder):
    vlm = VLM(released(hf_folder).model)
    cpu = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    params = load_folder(hf_folder, vlm, jax.tree.map(lambda _: cpu, vlm.abstract()))
    expected = from_arrays(vlm.config, tensors(hf_folder))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(expected)[path], strict=True)


# --- JSON files -------------------------------------------------------------------------------------------------------

RELEASED = {
    "model_type": "qwen2_5_vl", "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu", "sliding_window": 32768,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
}  # fmt: skip
"""As the 7B model was released."""


def changed(key, value):
    content = json.loads(json.dumps(RELEASED))
    *section, name = key.split(".")
    (content[section[0]] if section else content)[name] = value
    return content


def test_a_released_config():
    found = read_config(RELEASED, {})
    assert found.model == families.resolve({"preset": "qwen2_5_vl_7b"})
    assert found.image == PatchConfig()


def test_what_a_released_config_leaves_out_is_as_released():
    content = changed("vision_config", {"hidden_size": 1280, "in_chans": 3, "spatial_patch_size": 14})
    assert read_config(content, {}).model == families.resolve({"preset": "qwen2_5_vl_7b"})
    shapes = {"visual.blocks.0.mlp.gate_proj.weight": (3456, 1280), "lm_head.weight": (1, 1)}
    assert read_config(content, shapes).model.vision.mlp_width == 3456
    untold = {key: value for key, value in content.items() if key != "tie_word_embeddings"}
    nested = {"model.visual.blocks.0.mlp.gate_proj.weight": (3456, 1280)}
    assert read_config(untold, nested).model.decoder.tied and not read_config(untold, shapes).model.decoder.tied
    assert read_config(changed("vision_config.depth", 10), {}).model.vision.full_layers == (7,)


def test_newer_files():
    text = {key: value for key, value in RELEASED.items() if key not in ("vision_config", "model_type", "rope_scaling")}
    text["rope_parameters"] = {
        "rope_type": "default",
        "mrope_section": [16, 24, 24],
        "rope_theta": text.pop("rope_theta"),
    }
    content = {"model_type": "qwen2_5_vl", "vision_config": RELEASED["vision_config"], "text_config": text}
    assert read_config(content, {}) == read_config(RELEASED, {})
    preprocessor = {"size": {"shortest_edge": 3136, "longest_edge": 1003520}}
    assert read_config(content, {}, preprocessor).image == PatchConfig(max_pixels=1003520)


@pytest.mark.parametrize("changes", VARIANTS)
def test_what_is_written_is_read_again(changes):
    model, image = tiny(changes), PatchConfig(min_pixels=64, max_pixels=4096, context="pooled:2", fps=1.0)
    found = read_config(write_config(model, "float32"), {}, write_preprocessor(model, image))
    assert found.model == model and found.image == image


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("use_sliding_window", True, "use_sliding_window must be False, got True"),
        ("rope_scaling", {"type": "yarn", "mrope_section": [16, 24, 24]}, "rope_scaling .* must be of type mrope"),
        ("rope_scaling", None, "rope_scaling .* must be of type mrope, with mrope_section; got None"),
        ("hidden_size", None, "config.json must have hidden_size"),
        ("vision_config.window_size", 27, "window must be at least patch_size [*] merge 28, got 27"),
    ],
)
def test_what_is_not_supported_names_its_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(changed(key, value), {})


def test_an_unknown_family_is_named(hf_folder):
    content = json.loads((hf_folder / "config.json").read_text()) | {"model_type": "llava"}
    (hf_folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError,
        match="model_type of config.json must be one of internvl_chat, qwen2_5_vl, qwen3_vl, llava_qwen; .* 'llava'",
    ):
        released(hf_folder)
