"""Tensor names of Qwen2.5-VL, as published and as newer libraries write them."""

from collections.abc import Iterable, Mapping

import numpy as np

from vlmem_jax.hub import memories
from vlmem_jax.hub.fit import assemble
from vlmem_jax.models import ModelConfig
from vlmem_jax.records import Rule, section

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
    rules = _vision(config, tower) + _decoder(config.decoder, text, vocab)
    return rules + memories.rules(config, f"{text}layers.{{}}.")


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


def _decoder(decoder, prefix: str, vocab: int | None) -> list[Rule]:
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
    copies = (HEAD,) if decoder.tied else ()
    rules = [
        *section("decoder/layers/", prefix + "layers.{}.", sizes, layer, range(decoder.layers)),
        *section("decoder/", prefix, sizes, [("norm/scale", "norm.weight", "D -> D")]),
        Rule("decoder/embed", (f"{prefix}embed_tokens.weight",), "V D -> V D", sizes, copies=copies),
    ]
    return rules if decoder.tied else [*rules, Rule("decoder/head/kernel", (HEAD,), "V D -> D V", sizes)]


def from_arrays(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Tensors by their Hugging Face name -> the model's parameters; see `fit.assemble`."""
    return assemble(name_table(config, is_nested(tensors)), tensors)
