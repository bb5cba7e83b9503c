"""Qwen3-VL, dense (arXiv 2511.21631): sizes, tensor names as published and as derived files have them, JSON files."""

from collections.abc import Iterable, Mapping
from typing import Any

from vlmem_jax.config import build
from vlmem_jax.families.base import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    VIDEO_FILE,
    Family,
    Released,
    memory_tensors,
    read_image,
    read_memory,
    write_image,
    write_memory,
)
from vlmem_jax.families.qwen2_5_vl import DECODER, HEAD, TOKENS, decoder_tensors
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import StepConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import Rule, check_fixed, check_needed, ours, section, theirs

_SMALL_VIT = dict(kind="qwen3_vit", width=1024, layers=24, heads=16, mlp_width=4096, deep_layers=(5, 11, 17))
_LARGE_VIT = dict(kind="qwen3_vit", width=1152, layers=27, heads=16, mlp_width=4304, deep_layers=(8, 16, 24))
_QWEN3 = dict(
    vocab=151936, kv_heads=8, head_dim=128, rope_theta=5e6, rope_sections=(24, 20, 20), rope_interleaved=True,
    norm_eps=1e-6, max_positions=262144, qk_norm=True,
)  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # Qwen3-VL, arXiv 2511.21631
    "qwen3_vl_2b": dict(
        vision=_SMALL_VIT,
        decoder=dict(_QWEN3, width=2048, layers=28, heads=16, mlp_width=6144, tied=True),
    ),
    "qwen3_vl_4b": dict(
        vision=_SMALL_VIT,
        decoder=dict(_QWEN3, width=2560, layers=36, heads=32, mlp_width=9728, tied=True),
    ),
    "qwen3_vl_8b": dict(
        vision=_LARGE_VIT,
        decoder=dict(_QWEN3, width=4096, layers=36, heads=32, mlp_width=12288),
    ),
    "qwen3_vl_32b": dict(
        vision=_LARGE_VIT,
        decoder=dict(_QWEN3, width=5120, layers=64, heads=64, mlp_width=25600),
    ),
    "tiny_qwen3_vl": dict(
        vision=dict(
            kind="qwen3_vit", width=32, layers=4, heads=2, mlp_width=48, patch_size=4, position_grid=5,
            deep_layers=(0, 2),
        ),
        decoder=dict(
            vocab=160, width=64, layers=4, heads=4, kv_heads=2, head_dim=24, mlp_width=96, rope_sections=(4, 4, 4),
            rope_interleaved=True, qk_norm=True, tied=True, norm_eps=1e-6,
        ),
        memories=dict(
            comemo=dict(every=2, heads=4, head_dim=24, mlp_width=80),
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
"""Models by name: released ones, and a small one."""

# --- tensors ----------------------------------------------------------------------------------------------------------

Prefixes = tuple[str, str]
"""How the names of the tower's tensors begin, and those of the decoder's."""
PUBLISHED: Prefixes = "model.visual.", "model.language_model."
LAYOUTS: tuple[Prefixes, ...] = (
    PUBLISHED,
    ("visual.", "model."),
    ("model.visual.", "model."),
    ("visual.", "model.language_model."),
)


def layout(names: Iterable[str]) -> Prefixes:
    """Of LAYOUTS, the one that the tensors of a checkpoint follow."""
    names = set(names)
    is_short = any(name.startswith("visual.") for name in names)
    is_flat = any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in names)
    return "visual." if is_short else PUBLISHED[0], "model." if is_flat else PUBLISHED[1]


def name_table(config: ModelConfig, prefixes: Prefixes | None = None, vocab: int | None = None) -> list[Rule]:
    """Every leaf of the model's parameters and the tensor(s) it comes from; linear weights there are [out, in].

    prefixes: of LAYOUTS; None: as published. vocab: rows of the checkpoint's embedding, if not the model's.
    """
    tower, text = prefixes or PUBLISHED
    rules = _vision(config, tower) + decoder_tensors(config.decoder, text, vocab)
    return rules + memory_tensors(config, f"{text}layers.{{}}.")


def _vision(config: ModelConfig, prefix: str) -> list[Rule]:
    vision = config.vision
    sizes = {"D": vision.width, "F": vision.mlp_width, "H": vision.heads, "C": vision.width // vision.heads}
    sizes |= {"t": vision.patch_frames, "p": vision.patch_size, "q": vision.patch_size, "P": vision.position_grid**2}
    sizes |= {"M": vision.merge**2 * vision.width, "N": vision.merge**2 * vision.width, "E": config.decoder.width}
    layer = [
        ("attn/qkv/kernel", "attn.qkv.weight", "(3 H C) D -> D 3 H C"),
        ("attn/qkv/bias", "attn.qkv.bias", "(3 H C) -> 3 H C"),
        ("attn/proj/kernel", "attn.proj.weight", "D (H C) -> H C D"),
        ("attn/proj/bias", "attn.proj.bias", "D -> D"),
        ("mlp/fc1/kernel", "mlp.linear_fc1.weight", "F D -> D F"),
        ("mlp/fc1/bias", "mlp.linear_fc1.bias", "F -> F"),
        ("mlp/fc2/kernel", "mlp.linear_fc2.weight", "D F -> F D"),
        ("mlp/fc2/bias", "mlp.linear_fc2.bias", "D -> D"),
        *_norm("norm1", "D"),
        *_norm("norm2", "D"),
    ]
    merger = [
        ("mlp/fc1/kernel", "linear_fc1.weight", "M N -> N M"),
        ("mlp/fc1/bias", "linear_fc1.bias", "M -> M"),
        ("mlp/fc2/kernel", "linear_fc2.weight", "E M -> M E"),
        ("mlp/fc2/bias", "linear_fc2.bias", "E -> E"),
    ]
    whole = [
        ("patch/kernel", "patch_embed.proj.weight", "D 3 t p q -> 3 t p q D"),
        ("patch/bias", "patch_embed.proj.bias", "D -> D"),
        ("position_embedding", "pos_embed.weight", "P D -> P D"),
    ]
    rules = [
        *section("vision/", prefix, sizes, whole),
        *section("vision/layers/", prefix + "blocks.{}.", sizes, layer, range(vision.layers)),
        *section("projector/", prefix + "merger.", sizes, [*merger, *_norm("norm", "D")]),
    ]
    if vision.deep_layers:
        levels, rows = prefix + "deepstack_merger_list.{}.", [*merger, *_norm("norm", "M")]
        rules += section("projector/levels/", levels, sizes, rows, range(len(vision.deep_layers)))
    return rules


def _norm(name: str, axis: str) -> list[tuple[str, str, str]]:
    pattern = f"{axis} -> {axis}"
    return [(f"{name}/scale", f"{name}.weight", pattern), (f"{name}/bias", f"{name}.bias", pattern)]


# --- JSON files -------------------------------------------------------------------------------------------------------

TEMPLATE = "qwen-vl-steps"
VISION = {
    "width": "hidden_size",
    "layers": "depth",
    "heads": "num_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "patch_frames": "temporal_patch_size",
    "merge": "spatial_merge_size",
    "deep_layers": "deepstack_visual_indexes",
}
"""Our key -> theirs. The defaults of the class that reads them there are the sizes of no released model."""
TEXT = {key: name for key, name in (DECODER | {"head_dim": "head_dim"}).items() if key not in ("tied", "rope_theta")}
FIXED = {"text_config.hidden_act": "silu", "text_config.attention_bias": False}
FIXED |= {"vision_config.hidden_act": "gelu_pytorch_tanh"}
"""Keys with one supported value."""
ROPE = {"rope_type": "default", "mrope_interleaved": True}
"""What stands beside the sections of rotary positions."""
VIDEO = {"fps": "fps", "min_frames": "min_frames", "max_frames": "max_frames"}


def read_config(
    content: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    preprocessor: Mapping[str, Any] | None = None,
) -> Released:
    """From a parsed config.json, with sections `text_config` and `vision_config`.

    `shapes` of the checkpoint's tensors say whether the head is tied where the top level does not. `preprocessor`, a
    parsed preprocessor_config.json, has that of videos as `video_processor`. Raises ValueError naming the key that is
    missing, or has a value that is not supported.
    """
    text, tower = (dict(content.get(key) or {}) for key in ("text_config", "vision_config"))
    check_fixed(FIXED, {**content, "text_config": text, "vision_config": tower})
    vision, decoder = ours(VISION, tower), ours(TEXT, text)
    check_needed("vision_config", VISION, vision, " ".join(VISION))
    check_needed("text_config", TEXT, decoder, " ".join(TEXT))
    side = round(tower.get("num_position_embeddings", 0) ** 0.5)
    if side**2 != tower.get("num_position_embeddings"):
        raise ValueError(
            "vision_config.num_position_embeddings of config.json must be a square, "
            f"got {tower.get('num_position_embeddings')}"
        )
    if (width := tower.get("out_hidden_size", decoder["width"])) != decoder["width"]:
        raise ValueError(
            f"vision_config.out_hidden_size of config.json must be text_config.hidden_size {decoder['width']}, "
            f"got {width}"
        )
    about_pixels = preprocessor or {}
    vision |= {"kind": "qwen3_vit", "position_grid": side}
    for key, name in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        if name in about_pixels:
            vision[key] = about_pixels[name]
    tied = content.get("tie_word_embeddings", bool(shapes) and HEAD not in shapes)  # that in text_config is no guide
    model = {"vision": vision, "decoder": decoder | _rope(text) | {"qk_norm": True, "tied": tied}}
    model |= read_memory(content, shapes)
    dtype = content.get("torch_dtype", content.get("dtype", text.get("dtype")))
    model |= {"compute_dtype": "float32"} if dtype == "float32" else {}
    about_videos = about_pixels.get("video_processor") or {}
    image = read_image(about_pixels) | ours(VIDEO, about_videos)
    image |= _limits(about_pixels, "min_pixels", "max_pixels")
    image |= _limits(about_videos, "min_video_pixels", "max_video_pixels")
    if "fps" in image:
        image["fps"] = float(image["fps"])
    return Released(build(ModelConfig, model, "config.json"), build(StepConfig, image, "config.json"))


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of rotary positions; a config that does not tell them would be read with others than the model has."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta = rope.get("rope_theta", text.get("rope_theta"))
    rope = {"rope_type": rope.get("type", "default")} | dict(rope)
    if "mrope_section" not in rope or any(rope.get(key, value) != value for key, value in ROPE.items()):
        raise ValueError(
            f"rope_scaling of config.json must have mrope_section, and of {', '.join(ROPE)} the values "
            f"{', '.join(map(str, ROPE.values()))}; got {rope}"
        )
    if theta is None:
        raise ValueError("config.json must have text_config.rope_theta")
    return {"rope_theta": float(theta), "rope_sections": rope["mrope_section"], "rope_interleaved": True}


def _limits(about: Mapping[str, Any], least: str, most: str) -> dict[str, int]:
    """Our keys of the limits of pixels, which published files call edges."""
    size = about.get("size") or {}
    found = {
        least: about.get("min_pixels", size.get("shortest_edge")),
        most: about.get("max_pixels", size.get("longest_edge")),
    }
    return {key: value for key, value in found.items() if value is not None}


def write_config(model: ModelConfig, dtype: str, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """The config.json of such a model whose tensors are of `dtype`; ids of control tokens as in `tokenizer`."""
    vision, decoder = model.vision, model.decoder
    content = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "torch_dtype": dtype,
        "tie_word_embeddings": decoder.tied,
        "vision_config": theirs(VISION, vision)
        | {
            "model_type": "qwen3_vl",
            "in_channels": 3,
            "deepstack_visual_indexes": list(vision.deep_layers),
            "num_position_embeddings": vision.position_grid**2,
            "out_hidden_size": decoder.width,
            "hidden_act": "gelu_pytorch_tanh",
        },
        "text_config": theirs(TEXT, decoder)
        | {
            "model_type": "qwen3_vl_text",
            "dtype": dtype,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_theta": decoder.rope_theta,
            "rope_scaling": ROPE | {"mrope_section": list(decoder.rope_sections)},
        },
    }
    content |= write_memory(model)
    if tokenizer is not None:
        content |= {key: tokenizer.id(token) for key, token in TOKENS.items()}
    return content


def write_preprocessors(model: ModelConfig, image: StepConfig) -> dict[str, dict[str, Any]]:
    """The preprocessor_config.json of such a model, and that of videos, which transformers reads them by."""
    vision = model.vision
    shared = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.patch_frames,
        "merge_size": vision.merge,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    told = ("min_pixels", "max_pixels", "min_video_pixels", "max_video_pixels", *VIDEO)
    images = {"shortest_edge": image.min_pixels, "longest_edge": image.max_pixels}
    videos = {"shortest_edge": image.min_video_pixels, "longest_edge": image.max_video_pixels}
    return {
        PREPROCESSOR_FILE: {"image_processor_type": "Qwen2VLImageProcessorFast", "size": images}
        | shared
        | write_image(image, told),
        VIDEO_FILE: {"video_processor_type": "Qwen3VLVideoProcessor", "size": videos} | shared | theirs(VIDEO, image),
    }


def _files(model: ModelConfig, image: StepConfig, dtype: str, tokenizer: Tokenizer | None) -> dict[str, dict[str, Any]]:
    return {CONFIG_FILE: write_config(model, dtype, tokenizer)} | write_preprocessors(model, image)


FAMILY = Family(
    tower="qwen3_vit",
    image=StepConfig,
    template=TEMPLATE,
    name_table=name_table,
    layout=layout,
    layouts=LAYOUTS,
    read_config=read_config,
    write_files=_files,
    sizes=SIZES,
    adapter_layout=PUBLISHED,
)
