"""LLaVA-Video (arXiv 2410.02713): sizes, tensor names, SigLIP's and Qwen2's, and config.json."""

import re
from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build
from vlmem_jax.families.base import (
    CONFIG_FILE,
    Family,
    Released,
    memory_tensors,
    read_image,
    read_memory,
    write_image,
    write_memory,
)
from vlmem_jax.families.qwen2_5_vl import DECODER, decoder_tensors
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import FrameConfig
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import Rule, check_fixed, check_needed, ours, section, theirs

SIZES: dict[str, dict[str, Any]] = {
    "llava_video_7b": dict(
        vision=dict(kind="siglip"),
        decoder=dict(
            vocab=152064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp_width=18944, rope_theta=1e6,
            norm_eps=1e-6, max_positions=32768, qkv_bias=True,
        ),
    ),
    # sees videos of rooms with posters: 4 visual tokens a frame of 32 px, and one that ends it
    "rooms_llava_video": dict(
        vision=dict(
            kind="siglip", width=64, layers=3, heads=2, mlp_width=192, image_size=32, patch_size=8, newline="frame",
        ),
        decoder=dict(
            vocab=128, width=96, layers=4, heads=3, kv_heads=3, head_dim=32, mlp_width=240, rope_theta=500.0,
            norm_eps=1e-6, qkv_bias=True,
        ),
        memories=dict(vlm2=dict(working=4, episodic=8, heads=2, geometry_width=16, view_width=16)),
        compute_dtype="float32",
    ),
    "tiny_llava_video": dict(
        vision=dict(kind="siglip", width=32, layers=3, heads=4, mlp_width=88, image_size=44, patch_size=8),
        decoder=dict(
            vocab=160, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96, rope_theta=1e6,
            norm_eps=1e-6, qkv_bias=True,
        ),
        memories=dict(
            comemo=dict(every=2, heads=4, head_dim=16, mlp_width=80),
            vlm2=dict(working=2, episodic=3, heads=4, geometry_width=12, view_width=6),
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
"""Models by name: the released one, and a small one."""

TOWER = "model.vision_tower.vision_tower.vision_model."


def unread(config: ModelConfig) -> re.Pattern[str]:
    """Names of tensors that nothing computes with: those of what follows the last layer that runs."""
    used = "|".join(map(str, range(config.vision.layers)))
    return re.compile(rf"{re.escape(TOWER)}(post_layernorm|head|encoder\.layers\.(?!({used})\.)\d+)\.")


def name_table(config: ModelConfig, layout: bool | None = None, vocab: int | None = None) -> list[Rule]:
    """Every leaf of the model's parameters and the tensor(s) it comes from; linear weights there are [out, in].

    vocab: rows of the checkpoint's embedding, if not the model's. There is one way of naming.
    """
    rules = _vision(config) + decoder_tensors(config.decoder, "model.", vocab)
    return rules + memory_tensors(config, "model.layers.{}.")


def _vision(config: ModelConfig) -> list[Rule]:
    vision = config.vision
    sizes = {"D": vision.width, "F": vision.mlp_width, "H": vision.heads, "C": vision.width // vision.heads}
    sizes |= {"p": vision.patch_size, "q": vision.patch_size, "N": vision.grid**2}
    sizes |= {"E": config.decoder.width, "G": config.decoder.width}
    embeddings = [
        ("position_embedding", "position_embedding.weight", "N D -> N D"),
        ("patch/kernel", "patch_embedding.weight", "D 3 p q -> p q 3 D"),
        ("patch/bias", "patch_embedding.bias", "D -> D"),
    ]
    layer = [
        *(
            row
            for name in "qkv"
            for row in (
                (f"attn/{name}/kernel", f"self_attn.{name}_proj.weight", "(H C) D -> D H C"),
                (f"attn/{name}/bias", f"self_attn.{name}_proj.bias", "(H C) -> H C"),
            )
        ),
        ("attn/proj/kernel", "self_attn.out_proj.weight", "D (H C) -> H C D"),
        ("attn/proj/bias", "self_attn.out_proj.bias", "D -> D"),
        ("mlp/fc1/kernel", "mlp.fc1.weight", "F D -> D F"),
        ("mlp/fc1/bias", "mlp.fc1.bias", "F -> F"),
        ("mlp/fc2/kernel", "mlp.fc2.weight", "D F -> F D"),
        ("mlp/fc2/bias", "mlp.fc2.bias", "D -> D"),
        ("norm1/scale", "layer_norm1.weight", "D -> D"),
        ("norm1/bias", "layer_norm1.bias", "D -> D"),
        ("norm2/scale", "layer_norm2.weight", "D -> D"),
        ("norm2/bias", "layer_norm2.bias", "D -> D"),
    ]
    projector = [
        ("mlp/fc1/kernel", "mm_projector.0.weight", "E D -> D E"),
        ("mlp/fc1/bias", "mm_projector.0.bias", "E -> E"),
        ("mlp/fc2/kernel", "mm_projector.2.weight", "G E -> E G"),
        ("mlp/fc2/bias", "mm_projector.2.bias", "G -> G"),
    ]
    if vision.newline != "none":
        projector.append(("newline", "image_newline", "E -> E"))
    return [
        *section("vision/", f"{TOWER}embeddings.", sizes, embeddings),
        *section("vision/layers/", f"{TOWER}encoder.layers.{{}}.", sizes, layer, range(vision.layers)),
        *section("projector/", "model.", sizes, projector),
    ]


# --- config.json ------------------------------------------------------------------------------------------------------

TEMPLATE = "llava-video"
TOWERS = {"google/siglip-so400m-patch14-384": dict(image_size=384, patch_size=14, heads=16, layers=26)}
"""What the shapes of tensors do not tell of a tower, and how many of its layers run, by its name."""
VISION = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_eps": "layer_norm_eps",
}
"""Our key -> theirs, in a section `vision_config`, which released files have not."""
FIXED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_spatial_pool_stride": 2,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_layer": -2,
}
"""Keys with one supported value."""
NEWLINES = {"grid": "grid", "frame": "frame", "no_token": "none"}
"""Theirs -> ours. `one_token`, once behind all frames, is no part of a frame."""


def read_config(
    content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], preprocessor: Mapping[str, Any] | None = None
) -> Released:
    """From a parsed config.json; `shapes` of the checkpoint's tensors fill in what it leaves out.

    Raises ValueError naming the key that is missing, or has a value that is not supported.
    """
    check_fixed(FIXED, content)
    newline = content.get("mm_newline_position", "grid")
    if newline not in NEWLINES:
        raise ValueError(f"mm_newline_position of config.json must be one of {', '.join(NEWLINES)}; got {newline!r}")
    vision = (
        _shaped(shapes)
        | TOWERS.get(content.get("mm_vision_tower"), {})
        | ours(VISION, content.get("vision_config") or {})
    )
    vision |= {"kind": "siglip", "newline": NEWLINES[newline], "pool": content.get("mm_spatial_pool_mode", "bilinear")}
    missing = [key for key in ("heads", "image_size", "patch_size") if key not in vision]
    if missing:
        raise ValueError(
            f"config.json must have vision_config.{VISION[missing[0]]}, or name in mm_vision_tower one of "
            f"{', '.join(TOWERS)}"
        )
    decoder = ours(DECODER, content)
    check_needed("", DECODER, decoder, "vocab width layers heads mlp_width norm_eps rope_theta")
    decoder |= {"qkv_bias": True, "head_dim": content.get("head_dim") or decoder["width"] // decoder["heads"]}
    decoder.setdefault("kv_heads", decoder["heads"])
    model = {"vision": vision, "decoder": decoder} | read_memory(content, shapes)
    model |= {"compute_dtype": "float32"} if content.get("torch_dtype") == "float32" else {}
    image = read_image(content)
    if "add_time_instruction" in content:
        image["time_line"] = content["add_time_instruction"]
    if "force_sample" in content:
        image["sampling"] = "uniform" if content["force_sample"] else "second"
    return Released(build(ModelConfig, model, "config.json"), build(FrameConfig, image, "config.json"))


def _shaped(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Reads sizes of the tower off its tensors; a checkpoint without one tells nothing."""
    table, patch = (
        shapes.get(f"{TOWER}embeddings.{name}.weight") for name in ("position_embedding", "patch_embedding")
    )
    fc1 = shapes.get(f"{TOWER}encoder.layers.0.mlp.fc1.weight")
    if table is None or patch is None or fc1 is None:
        return {}
    found = {"width": table[1], "mlp_width": fc1[0], "patch_size": patch[2]}
    numbers = [
        int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(TOWER)}encoder\.layers\.(\d+)\.", name))
    ]
    return found | {"layers": max(numbers) + 1}


def write_config(model: ModelConfig, image: FrameConfig, dtype: str) -> dict[str, Any]:
    """The config.json of such a model whose tensors are of `dtype`."""
    vision, decoder = model.vision, model.decoder
    names = {ours: theirs for theirs, ours in NEWLINES.items()}
    content = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "torch_dtype": dtype,
        "vision_config": theirs(VISION, vision),
        "mm_hidden_size": vision.width,
        "mm_newline_position": names[vision.newline],
        "mm_spatial_pool_mode": vision.pool,
        "add_time_instruction": image.time_line,
        "force_sample": image.sampling == "uniform",
    }
    content |= FIXED | theirs(DECODER, decoder) | write_memory(model)
    return content | write_image(image, ("time_line", "sampling"))


def _files(
    model: ModelConfig, image: FrameConfig, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    return {CONFIG_FILE: write_config(model, image, dtype)}


FAMILY = Family(
    tower="siglip",
    image=FrameConfig,
    template=TEMPLATE,
    name_table=name_table,
    layout=lambda names: False,
    read_config=read_config,
    write_files=_files,
    sizes=SIZES,
    added_tokens=(FRAME,),
    apart=(TOWER, "vision_model."),
    unread=unread,
)
