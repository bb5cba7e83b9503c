import copy

import pytest

from vlmem_jax import families
from vlmem_jax.families.internvl import read_config, write_config
from vlmem_jax.processing.images import ImageConfig

INTERNVL2_2B = {
    "architectures": ["InternVLChatModel"],
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 448,
    "llm_config": {
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "vocab_size": 92553,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internlm2-chat",
    "torch_dtype": "bfloat16",
    "use_thumbnail": True,
    "vision_config": {
        "drop_path_rate": 0.1,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "image_size": 448,
        "initializer_factor": 1.0,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "qk_normalization": False,
        "qkv_bias": True,
    },
}


def changed(key: str, value) -> dict:
    content = copy.deepcopy(INTERNVL2_2B)
    *section, name = key.split(".")
    (content[section[0]] if section else content)[name] = value
    return content


def test_a_released_config_is_the_preset_of_its_size():
    found = read_config(INTERNVL2_2B, {})
    assert found.model == families.resolve({"preset": "comemo_2b", "memory": None})
    assert found.image == ImageConfig(max_tiles=12)


def test_settings_of_images_that_the_file_has_no_key_for_come_back():
    model = families.resolve({"preset": "tiny"})
    plain, own = ImageConfig(max_tiles=4), ImageConfig(max_tiles=4, context="thumbnail", dhr_map="fine", rope_dhr=False)
    assert "vlmem_image" not in write_config(model, plain, "float32")
    for image in (plain, own):
        assert read_config(write_config(model, image, "float32"), {}).image == image
    with pytest.raises(ValueError, match="context must be all, thumbnail, pooled:k, stride:n or kept:n"):
        read_config(write_config(model, own, "float32") | {"vlmem_image": {"context": "none"}}, {})


def test_the_golden_config_is_read_whole(released_config):
    found = read_config(released_config, {}).model
    assert (found.memory.kind, found.memory.every, found.memory.head_dim, found.memory.mlp_width) == (
        "comemo",
        2,
        16,
        80,
    )
    assert (found.decoder.head_dim, found.decoder.ntk_factor, found.vision.norm_eps) == (16, 2.0, 1e-6)


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "comemo_9b"},
        {"preset": "tiny", "memory": None},
        {
            "preset": "tiny",
            "vision": {"select_layer": -2, "position_grid": 6, "norm": "rms_norm", "qk_norm": True, "norm_eps": 1e-5},
            "decoder": {"rope_theta": 3e4, "ntk_factor": 4.0, "max_positions": 99, "head_dim": 20, "norm_eps": 1e-6},
            "memory": {"kind": "comemo", "every": 3, "rope_theta": 2e5, "norm_eps": 1e-4},
            "projector": {"shuffle": "v1"},
            "compute_dtype": "bfloat16",
        },
    ],
)
def test_what_is_written_reads_back_equal(model):
    model = families.resolve(model)
    image = ImageConfig(min_tiles=2, max_tiles=7, thumbnail=False)
    found = read_config(write_config(model, image, model.compute_dtype), {})
    assert found.model == model
    assert found.image == image


def test_missing_memory_sizes_come_from_shapes():
    block = "language_model.model.layers.{}.gated_cross_attn_layer."
    shapes = {block.format(layer) + "cross_attn.to_q.weight": (16 * 128, 2048) for layer in (5, 11)}
    shapes |= {block.format(layer) + "ffn_2.w1.weight": (8192, 2048) for layer in (5, 11)}
    comemo = read_config(INTERNVL2_2B | {"mixin_config": {"language_dim": 2048}}, shapes).model.memory
    assert (comemo.every, comemo.heads, comemo.head_dim, comemo.mlp_width) == (6, 16, 128, 8192)
    assert read_config(INTERNVL2_2B, shapes).model.memory_kind == "comemo"


def test_memory_sizes_that_nothing_tells():
    with pytest.raises(ValueError, match=r"must have mixin_config\.mixin_every_n_layers, .*num_heads, "):
        read_config(INTERNVL2_2B | {"mixin_config": {"head_dim": 64}}, {})


def test_without_dynamic_size_an_image_is_one_tile():
    image = read_config(changed("dynamic_image_size", False), {}).image
    assert (image.min_tiles, image.max_tiles) == (1, 1)


def test_a_tower_stored_at_another_size_is_resampled():
    vision = read_config(changed("vision_config.image_size", 224), {}).model.vision
    assert (vision.image_size, vision.position_grid) == (448, 16)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "llm_config.architectures",
            ["Qwen2ForCausalLM"],
            r"llm_config\.architectures must be",
        ),
        ("llm_config.tie_word_embeddings", True, r"llm_config\.tie_word_embeddings must be False, got True"),
        ("downsample_ratio", 0.25, r"downsample_ratio must be 0\.5, got 0\.25"),
        (
            "llm_config.rope_scaling",
            {"type": "linear", "factor": 2.0},
            "rope_scaling .*must be null",
        ),
        ("template", "Hermes-2", "template must be 'internlm2-chat', got 'Hermes-2'"),
        ("vision_config", {}, r"must have vision_config\.hidden_size, .*patch_size"),
        ("llm_config.hidden_size", None, r"must have llm_config\.hidden_size"),
        ("ps_version", "v3", "shuffle must be one of 'v1', 'v2'"),
    ],
)
def test_what_is_not_supported_names_its_key(key, value, message):
    with pytest.raises(ValueError, match=message):
        read_config(changed(key, value), {})
