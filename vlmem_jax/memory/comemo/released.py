"""CoMemo's memory blocks as they stand in a checkpoint: their tensor names, and `mixin_config` of its config.json."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.memory.comemo.config import CoMemoConfig
from vlmem_jax.records import Rule, check_needed, ours, section, theirs

LAYER = "gated_cross_attn_layer."
"""Level of a decoder layer's tensors that those of the block before it have."""
# Our key -> theirs.
KEYS = {
    "every": "mixin_every_n_layers",
    "heads": "num_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
}


def tensors(config: CoMemoConfig, decoder: DecoderConfig, layer: str) -> list[Rule]:
    """The blocks' part of a name table; `layer` is the name of a decoder layer, with {} for its number."""
    sizes = {"D": decoder.width, "F": config.mlp_width, "H": config.heads, "C": config.head_dim}
    rows = [
        ("attn_gate", "attn_gate", "g -> g"),
        ("mlp_gate", "ff_gate", "g -> g"),
        ("attn_norm/scale", "cross_attention_norm.weight", "D -> D"),
        ("mlp_norm/scale", "ffn_norm_2.weight", "D -> D"),
        ("attn/q/kernel", "cross_attn.to_q.weight", "(H C) D -> D H C"),
        ("attn/k/kernel", "cross_attn.to_kv.weight", "(kv H C) D -> D H C", {"kv": 0}),
        ("attn/v/kernel", "cross_attn.to_kv.weight", "(kv H C) D -> D H C", {"kv": 1}),
        ("attn/o/kernel", "cross_attn.to_out.weight", "D (H C) -> H C D"),
        ("mlp/gate/kernel", "ffn_2.w1.weight", "F D -> D F"),
        ("mlp/up/kernel", "ffn_2.w3.weight", "F D -> D F"),
        ("mlp/down/kernel", "ffn_2.w2.weight", "D F -> F D"),
    ]
    layers = range(config.every - 1, decoder.layers, config.every)
    return section("memory/blocks/", layer + LAYER, sizes | {"g": 1, "kv": 2}, rows, layers)


def read(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Our keys; None for a checkpoint without memory blocks. `shapes` of tensors fill in what config.json leaves out.

    Raises ValueError naming what neither tells.
    """
    mixin = content.get("mixin_config")
    blocks = {name: shape for name, shape in shapes.items() if f".{LAYER}" in name}
    if not mixin and not blocks:
        return None
    found = ours(KEYS, mixin or {})
    found.setdefault("head_dim", 128)  # assumed: shapes give only heads * head_dim
    tensors = {name.split(f".{LAYER}")[1]: shape for name, shape in blocks.items()}
    if blocks:
        found.setdefault("every", 1 + min(int(name.split(f".{LAYER}")[0].rsplit(".", 1)[1]) for name in blocks))
    if "cross_attn.to_q.weight" in tensors:
        found.setdefault("heads", tensors["cross_attn.to_q.weight"][0] // found["head_dim"])
    if "ffn_2.w1.weight" in tensors:
        found.setdefault("mlp_width", tensors["ffn_2.w1.weight"][0])
    check_needed("mixin_config", KEYS, found, "every heads mlp_width")
    return found


def write(config: CoMemoConfig, decoder: DecoderConfig) -> dict[str, Any]:
    """What config.json tells of a model with memory blocks."""
    return {"mixin_config": theirs(KEYS, config) | {"language_dim": decoder.width, "vision_dim": decoder.width}}
