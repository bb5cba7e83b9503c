"""Qwen2.5-VL (arXiv 2502.13923): sizes, tensor names as published and as newer libraries write them, JSON files."""

from collections.abc import Iterable, Mapping
from typing import Any

from vlmem_jax.config import build
from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.families.base import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    Family,
    Released,
    memory_tensors,
    read_image,
    read_memory,
    write_image,
    write_memory,
)
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import PatchConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import Rule, check_fixed, check_needed, ours, section, theirs

_QWEN_VIT = dict(kind="qwen_vit", width=1280, layers=32, heads=16, mlp_width=3420, full_layers=(7, 15, 23, 31))
_QWEN2_5 = dict(
    vocab=152064, head_dim=128, rope_theta=1e6, rope_sections=(16, 24, 24), norm_eps=1e-6, max_positions=128000,
    qkv_bias=True,
)  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # Qwen2.5-VL, arXiv 2502.13923
    "qwen2_5_vl_3b": dict(
        vision=_QWEN_VIT,
        decoder=dict(_QWEN2_5, vocab=151936, width=2048, layers=36, heads=16, kv_heads=2, mlp_width=11008, tied=True),
    ),
    "qwen2_5_vl_7b": dict(
        vision=_QWEN_VIT,
        decoder=dict(_QWEN2_5, width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944),
    ),
    "qwen2_5_vl_72b": dict(
        vision=dict(_QWEN_VIT, mlp_width=3456),
        decoder=dict(_QWEN2_5, width=8192, layers=80, heads=64, kv_heads=8, mlp_width=29568),
    ),
    # the same pictures, a visual token a digit; the ids of its memory are those of the demo's tokenizer
    "digits_qwen2_5_vl": dict(
        vision=dict(
            kind="qwen_vit", width=64, layers=2, heads=2, mlp_width=192, patch_size=4, window=8, full_layers=(1,),
        ),
        decoder=dict(
            vocab=128, width=96, layers=4, heads=3, kv_heads=3, head_dim=32, mlp_width=240, rope_theta=500.0,
            rope_sections=(4, 6, 6), qkv_bias=True, norm_eps=1e-6,
        ),
        memories=dict(
            vismem=dict(
                query_len=4, short_len=2, long_len=4, query_builder=dict(layers=1, heads=4, ff_mult=2),
                tiny=dict(layers=1, heads=4, ff_mult=2), lora=dict(rank=8, alpha=16.0, dropout=0.0),
                max_visual_hidden=64, max_prompt_hidden=64, max_positions=160,
                max_invocations=4, token_ids=(124, 125, 126, 127),
            ),
        ),
        compute_dtype="float32",
    ),
    "tiny_qwen2_5_vl": dict(
        vision=dict(
            kind="qwen_vit", width=32, layers=3, heads=2, mlp_width=48, patch_size=4, window=16, full_layers=(1,),
        ),
        decoder=dict(
            vocab=160, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96, rope_sections=(2, 3, 3),
            qkv_bias=True, tied=True, norm_eps=1e-6,
        ),
        memories=dict(
            comemo=dict(every=2, heads=4, head_dim=16, mlp_width=80),
            vismem=dict(
                query_len=4, short_len=3, long_len=5, query_builder=dict(layers=1, heads=4, ff_mult=2),
                tiny=dict(layers=2, heads=2, ff_mult=3), lora=dict(rank=4, alpha=8.0),
                max_visual_hidden=64, max_prompt_hidden=64, max_positions=160,
                max_invocations=3, token_ids=(156, 157, 158, 159), span_ids=(154, 155), start_id=8,
            ),
        ),
        compute_dtype="float32",
    ),
}  # fmt: skip
"""Models by name: released ones, and small ones."""

# --- tensors ----------------------------------------------------------------------------------------------------------

HEAD = "lm_head.weight"


def is_nested(names: Iterable[str]) -> bool:
    """Whether the tensors of a checkpoint are `model.visual.*` and `model.language_model.*` (newer libraries)."""
    return any(name.startswith("model.visual.") for name in names)


def name_table(config: ModelConfig, nested: bool | None = None, vocab: int | None = None) -> list[Rule]:
    """Every leaf of the model's parameters and the tensor(s) it comes from; linear weights there are [out, in].

    nested: names as in `is_nested`, instead of the published `visual.*` and `model.*`.
    vocab: rows of the checkpoint's embedding, if not the model's.
    """
    tower, text = ("model.visual.", "model.language_model.") if nested else ("visual.", "model.")
    rules = _vision(config, tower) + decoder_tensors(config.decoder, text, vocab)
    return rules + memory_tensors(config, f"{text}layers.{{}}.")


def _vision(config: ModelConfig, prefix: str) -> list[Rule]:
    vision = config.vision
    sizes = {"D": vision.width, "F": vision.mlp_width, "H": vision.heads, "C": vision.width // vision.heads}
    sizes |= {"t": vision.patch_frames, "p": vision.patch_size, "q": vision.patch_size}
    sizes |= {"M": vision.merge**2 * vision.width, "N": vision.merge**2 * vision.width, "E": config.decoder.width}
    layer = [
        ("attn/qkv/kernel", "attn.qkv.weight", "(3 H C) D -> D 3 H C"),
        ("attn/qkv/bias", "attn.qkv.bias", "(3 H C) -> 3 H C"),
        ("attn/proj/kernel", "attn.proj.weight", "D (H C) -> H C D"),
        ("attn/proj/bias", "attn.proj.bias", "D -> D"),
        ("mlp/gate/kernel", "mlp.gate_proj.weight", "F D -> D F"),
        ("mlp/gate/bias", "mlp.gate_proj.bias", "F -> F"),
        ("mlp/up/kernel", "mlp.up_proj.weight", "F D -> D F"),
        ("mlp/up/bias", "mlp.up_proj.bias", "F -> F"),
        ("mlp/down/kernel", "mlp.down_proj.weight", "D F -> F D"),
        ("mlp/down/bias", "mlp.down_proj.bias", "D -> D"),
        ("norm1/scale", "norm1.weight", "D -> D"),
        ("norm2/scale", "norm2.weight", "D -> D"),
    ]
    merger = [
        ("norm/scale", "ln_q.weight", "D -> D"),
        ("mlp/fc1/kernel", "mlp.0.weight", "M N -> N M"),
        ("mlp/fc1/bias", "mlp.0.bias", "M -> M"),
        ("mlp/fc2/kernel", "mlp.2.weight", "E M -> M E"),
        ("mlp/fc2/bias", "mlp.2.bias", "E -> E"),
    ]
    patch = [("patch/kernel", "patch_embed.proj.weight", "D 3 t p q -> 3 t p q D")]
    return [
        *section("vision/", prefix, sizes, patch),
        *section("vision/layers/", prefix + "blocks.{}.", sizes, layer, range(vision.layers)),
        *section("projector/", prefix + "merger.", sizes, merger),
    ]


def decoder_tensors(decoder: DecoderConfig, prefix: str, vocab: int | None) -> list[Rule]:
    """The decoder's part of a name table, as Qwen2 and those after it name tensors."""
    sizes = {"V": vocab or decoder.vocab, "D": decoder.width, "F": decoder.mlp_width}
    sizes |= {"H": decoder.heads, "K": decoder.kv_heads, "C": decoder.head_dim}
    layer = [
        ("attn/q/kernel", "self_attn.q_proj.weight", "(H C) D -> D H C"),
        ("attn/k/kernel", "self_attn.k_proj.weight", "(K C) D -> D K C"),
        ("attn/v/kernel", "self_attn.v_proj.weight", "(K C) D -> D K C"),
        ("attn/o/kernel", "self_attn.o_proj.weight", "D (H C) -> H C D"),
        ("mlp/gate/kernel", "mlp.gate_proj.weight", "F D -> D F"),
        ("mlp/up/kernel", "mlp.up_proj.weight", "F D -> D F"),
        ("mlp/down/kernel", "mlp.down_proj.weight", "D F -> F D"),
        ("attn_norm/scale", "input_layernorm.weight", "D -> D"),
        ("mlp_norm/scale", "post_attention_layernorm.weight", "D -> D"),
    ]
    if decoder.qkv_bias:
        layer += [
            ("attn/q/bias", "self_attn.q_proj.bias", "(H C) -> H C"),
            ("attn/k/bias", "self_attn.k_proj.bias", "(K C) -> K C"),
            ("attn/v/bias", "self_attn.v_proj.bias", "(K C) -> K C"),
        ]
    if decoder.qk_norm:
        layer += [
            ("attn/q_norm/scale", "self_attn.q_norm.weight", "C -> C"),
            ("attn/k_norm/scale", "self_attn.k_norm.weight", "C -> C"),
        ]
    copies = (HEAD,) if decoder.tied else ()
    rules = [
        *section("decoder/layers/", prefix + "layers.{}.", sizes, layer, range(decoder.layers)),
        *section("decoder/", prefix, sizes, [("norm/scale", "norm.weight", "D -> D")]),
        Rule("decoder/embed", (f"{prefix}embed_tokens.weight",), "V D -> V D", sizes, copies=copies),
    ]
    return rules if decoder.tied else [*rules, Rule("decoder/head/kernel", (HEAD,), "V D -> D V", sizes)]


# --- JSON files -------------------------------------------------------------------------------------------------------

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
    model = {"vision": vision, "decoder": decoder} | read_memory(content, shapes)
    dtype = content.get("torch_dtype", content.get("dtype"))
    model |= {"compute_dtype": "float32"} if dtype == "float32" else {}
    size = about_pixels.get("size") or {}
    limits = {
        "min_pixels": about_pixels.get("min_pixels", size.get("shortest_edge")),
        "max_pixels": about_pixels.get("max_pixels", size.get("longest_edge")),
    }
    image = read_image(about_pixels) | {key: value for key, value in limits.items() if value is not None}
    return Released(build(ModelConfig, model, "config.json"), build(PatchConfig, image, "config.json"))


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
    rate = content["vision_config"]["tokens_per_second"]
    if rate == int(rate):  # as released; transformers takes a whole number alone
        content["vision_config"]["tokens_per_second"] = int(rate)
    content |= theirs(DECODER, decoder) | write_memory(model)
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
    } | write_image(image, ("min_pixels", "max_pixels"))


def _files(
    model: ModelConfig, image: PatchConfig, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    return {
        CONFIG_FILE: write_config(model, dtype, tokenizer),
        PREPROCESSOR_FILE: write_preprocessor(model, image),
    }


FAMILY = Family(
    tower="qwen_vit",
    image=PatchConfig,
    template=TEMPLATE,
    name_table=name_table,
    layout=is_nested,
    read_config=read_config,
    write_files=_files,
    sizes=SIZES,
    adapter_layout=True,
)
