"""config.json and preprocessor_config.json of Qwen2.5-VL, with any memory <-> our model and image configs."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build
from vlmem_jax.hub import memories
from vlmem_jax.hub.qwen2_5_vl import HEAD
from vlmem_jax.hub.settings import Released
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import PatchConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import check_fixed, check_needed, ours, theirs

TEMPLATE = "qwen2-vl"
# Our key -> theirs. A key of theirs that is left out gets our default, which is what the released models have.
VISION = {
    "width": "hidden_size",
    "layers": "depth",
    "heads": "num_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "patch_frames": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "window": "window_size",
    "full_layers": "fullatt_block_indexes",
    "tokens_per_second": "tokens_per_second",
}
DECODER = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
DECODER_DEFAULTS = {"norm_eps": 1e-6, "rope_theta": 1e6, "max_positions": 128000}
FIXED = {"hidden_act": "silu", "use_sliding_window": False, "vision_config.hidden_act": "silu"}
"""Keys with one supported value."""
TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def read_config(
    content: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    preprocessor: Mapping[str, Any] | None = None,
) -> Released:
    """From a parsed config.json, whose text keys may stand in a section `text_config` (newer libraries).

    `shapes` of the checkpoint's tensors and `preprocessor`, a parsed preprocessor_config.json, fill in what it leaves
    out. Raises ValueError naming the key that is missing, or has a value that is not supported.
    """
    content = dict(content) | dict(content.get("text_config") or {})
    check_fixed(FIXED, content)
    tower, about_pixels = dict(content.get("vision_config") or {}), preprocessor or {}
    tower.setdefault("patch_size", tower.get("spatial_patch_size"))
    vision = ours(VISION, tower) | {"kind": "qwen_vit"}
    short = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    if "visual.blocks.0.mlp.gate_proj.weight" in short:
        stored = short["visual.blocks.0.mlp.gate_proj.weight"]
        vision = {"mlp_width": stored[0], "width": stored[1]} | vision
    for key, name in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if name in about_pixels:
            vision[key] = about_pixels[name]
    decoder = DECODER_DEFAULTS | ours(DECODER, content)
    check_needed("", DECODER, decoder, "vocab width layers heads mlp_width")
    decoder.setdefault("kv_heads", decoder["heads"])
    decoder["head_dim"] = content.get("head_dim") or decoder["width"] // decoder["heads"]
    decoder.setdefault("tied", bool(shapes) and HEAD not in shapes)
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "mrope")) not in ("mrope", "default") or "mrope_section" not in rope:
        raise ValueError(f"rope_scaling of config.json must be of type mrope, with mrope_section; got {rope or None}")
    decoder |= {"rope_sections": rope["mrope_section"], "qkv_bias": True}
    decoder["rope_theta"] = float(rope.get("rope_theta", decoder["rope_theta"]))
    if "layers" in vision and "full_layers" in vision:  # small models keep the list of large ones
        vision["full_layers"] = [layer for layer in vision["full_layers"] if layer < vision["layers"]]
    if "tokens_per_second" in vision:
        vision["tokens_per_second"] = float(vision["tokens_per_second"])
    model = {"vision": vision, "decoder": decoder} | memories.read(content, shapes)
    dtype = content.get("torch_dtype", content.get("dtype"))
    model |= {"compute_dtype": "float32"} if dtype == "float32" else {}
    size = about_pixels.get("size") or {}
    limits = {
        "min_pixels": about_pixels.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": about_pixels.get("max_pixels", size.get("longest_edge")),
    }
    image = {key: value for key, value in limits.items() if value is not None} | {"kind": "patches"}
    return Released(build(ModelConfig, model, "config.json"), build(PatchConfig, image, "config.json"), TEMPLATE)


def write_config(model: ModelConfig, dtype: str, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config.json of such a model whose tensors are of `dtype`; ids of control tokens as in `tokenizer`."""
    vision, decoder = model.vision, model.decoder
    content = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "vision_config": theirs(VISION, vision)
        | {
            "model_type": "qwen2_5_vl",
            "in_chans": 3,
            "spatial_patch_size": vision.patch_size,
            "out_hidden_size": decoder.width,
            "fullatt_block_indexes": list(vision.full_layers),
            "hidden_act": "silu",
        },
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": list(decoder.rope_sections)},
    }
    content |= theirs(DECODER, decoder) | memories.write(model)
    if tokenizer is not None:
        content |= {key: tokenizer.id(token) for key, token in TOKENS.items()}
    return content


def write_preprocessor(model: ModelConfig, image: PatchConfig) -> dict[str, Any]:
    """The preprocessor_config.json of such a model."""
    vision = model.vision
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": image.min_pixels,
        "max_pixels": image.max_pixels,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.patch_frames,
        "merge_size": vision.merge,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
