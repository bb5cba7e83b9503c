"""LLaVA-Video (arXiv 2410.02713): sizes and tensor names, SigLIP's and Qwen2's."""

import re
from typing import Any

from vlmem_jax.families.base import memory_tensors
from vlmem_jax.families.qwen2_5_vl import decoder_tensors
from vlmem_jax.models import ModelConfig
from vlmem_jax.records import Rule, section

SIZES: dict[str, dict[str, Any]] = {
    "llava_video_7b": dict(
        vision=dict(kind="siglip"),
        decoder=dict(
            vocab=152064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp_width=18944, rope_theta=1e6,
            norm_eps=1e-6, max_positions=32768, qkv_bias=True,
        ),
    ),
    "tiny_llava_video": dict(
        vision=dict(kind="siglip", width=32, layers=3, heads=4, mlp_width=88, image_size=44, patch_size=8),
        decoder=dict(
            vocab=160, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96, rope_theta=1e6,
            norm_eps=1e-6, qkv_bias=True,
        ),
        compute_dtype="float32",
    ),
}  # fmt: skip
"""Models by name: the released one, and a small one."""

TOWER = "model.vision_tower.vision_tower.vision_model."


def unread(layers: int) -> re.Pattern[str]:
    """Names of tensors that a checkpoint may hold and nothing computes with: what follows the last of `layers`."""
    later = rf"encoder\.layers\.(?!({'|'.join(map(str, range(layers)))})\.)\d+\."
    return re.compile(rf"{re.escape(TOWER)}(post_layernorm\.|head\.|{later})")


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
