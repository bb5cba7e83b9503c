"""Tensor names of InternVL2 with an InternLM2 decoder."""

from collections.abc import Iterable, Mapping

import numpy as np

from vlmem_jax.hub import memories
from vlmem_jax.hub.fit import assemble
from vlmem_jax.memory import MEMORIES
from vlmem_jax.models import ModelConfig
from vlmem_jax.records import Rule, section

LAYER = "language_model.model.layers.{}."
NESTED = "decoder_layer."
"""CoMemo's release wraps every decoder layer, those without a memory block too; InternVL2's does not."""
EMBEDDING = "language_model.model.tok_embeddings.weight"
HEAD = "language_model.output.weight"


def is_wrapped(names: Iterable[str]) -> bool:
    """Whether the tensors of a checkpoint have the level NESTED."""
    return any(f".{NESTED}" in name for name in names)


def name_table(config: ModelConfig, wrapped: bool | None = None, vocab: int | None = None) -> list[Rule]:
    """Every leaf of the model's parameters and the tensor(s) it comes from; linear weights there are [out, in].

    wrapped: decoder layers have the extra level NESTED (default: as with the memory, see `Memory.wraps_layers`).
    vocab: rows of the checkpoint's embedding, if not the model's.
    """
    if wrapped is None:
        wrapped = config.memory != "none" and MEMORIES[config.memory].wraps_layers
    rules = _vision(config.vision) + _projector(config) + _decoder(config.decoder, NESTED * wrapped, vocab)
    return rules + memories.rules(config, LAYER)


def _vision(vision) -> list[Rule]:
    side = vision.position_grid or vision.grid
    sizes = {"D": vision.width, "F": vision.mlp_width, "H": vision.heads, "C": vision.width // vision.heads}
    sizes |= {"p": vision.patch_size, "q": vision.patch_size, "N": 1 + side * side}
    embeddings = [
        ("class_embedding", "class_embedding", "1 1 D -> D"),
        ("position_embedding", "position_embedding", "1 N D -> N D"),
        ("patch/kernel", "patch_embedding.weight", "D 3 p q -> p q 3 D"),
        ("patch/bias", "patch_embedding.bias", "D -> D"),
    ]
    layer = [
        ("ls1", "ls1", "D -> D"),
        ("ls2", "ls2", "D -> D"),
        ("attn/qkv/kernel", "attn.qkv.weight", "(3 H C) D -> D 3 H C"),
        ("attn/qkv/bias", "attn.qkv.bias", "(3 H C) -> 3 H C"),
        ("attn/proj/kernel", "attn.proj.weight", "D (H C) -> H C D"),
        ("attn/proj/bias", "attn.proj.bias", "D -> D"),
        ("mlp/fc1/kernel", "mlp.fc1.weight", "F D -> D F"),
        ("mlp/fc1/bias", "mlp.fc1.bias", "F -> F"),
        ("mlp/fc2/kernel", "mlp.fc2.weight", "D F -> F D"),
        ("mlp/fc2/bias", "mlp.fc2.bias", "D -> D"),
        ("norm1/scale", "norm1.weight", "D -> D"),
        ("norm2/scale", "norm2.weight", "D -> D"),
    ]
    if vision.norm == "layer_norm":
        layer += [("norm1/bias", "norm1.bias", "D -> D"), ("norm2/bias", "norm2.bias", "D -> D")]
    if vision.qk_norm:
        layer += [("attn/q_norm/scale", "attn.q_norm.weight", "D -> D")]
        layer += [("attn/k_norm/scale", "attn.k_norm.weight", "D -> D")]
    return section("vision/", "vision_model.embeddings.", sizes, embeddings) + section(
        "vision/layers/", "vision_model.encoder.layers.{}.", sizes, layer, range(vision.layers)
    )


def _projector(config: ModelConfig) -> list[Rule]:
    sizes = {"S": 4 * config.vision.width, "D": config.decoder.width, "E": config.decoder.width}
    rows = [
        ("norm/scale", "0.weight", "S -> S"),
        ("norm/bias", "0.bias", "S -> S"),
        ("mlp/fc1/kernel", "1.weight", "D S -> S D"),
        ("mlp/fc1/bias", "1.bias", "D -> D"),
        ("mlp/fc2/kernel", "3.weight", "E D -> D E"),
        ("mlp/fc2/bias", "3.bias", "E -> E"),
    ]
    return section("projector/", "mlp1.", sizes, rows)


def _decoder(decoder, level: str, vocab: int | None) -> list[Rule]:
    groups = decoder.heads // decoder.kv_heads
    sizes = {"V": vocab or decoder.vocab, "D": decoder.width, "F": decoder.mlp_width}
    sizes |= {"H": decoder.heads, "K": decoder.kv_heads, "R": groups + 2, "C": decoder.head_dim}
    # wqkv interleaves: each kv head brings the rows of its G query heads, then its key, then its value
    layer = [
        ("attn/q/kernel", "attention.wqkv.weight", "(K R C) D -> D (K R) C", {"R": slice(groups)}),
        ("attn/k/kernel", "attention.wqkv.weight", "(K R C) D -> D K C", {"R": groups}),
        ("attn/v/kernel", "attention.wqkv.weight", "(K R C) D -> D K C", {"R": groups + 1}),
        ("attn/o/kernel", "attention.wo.weight", "D (H C) -> H C D"),
        ("mlp/gate/kernel", "feed_forward.w1.weight", "F D -> D F"),
        ("mlp/up/kernel", "feed_forward.w3.weight", "F D -> D F"),
        ("mlp/down/kernel", "feed_forward.w2.weight", "D F -> F D"),
        ("attn_norm/scale", "attention_norm.weight", "D -> D"),
        ("mlp_norm/scale", "ffn_norm.weight", "D -> D"),
    ]
    ends = [
        ("embed", "model.tok_embeddings.weight", "V D -> V D"),
        ("norm/scale", "model.norm.weight", "D -> D"),
        ("head/kernel", "output.weight", "V D -> D V"),
    ]
    return section("decoder/layers/", LAYER + level, sizes, layer, range(decoder.layers)) + section(
        "decoder/", "language_model.", sizes, ends
    )


def from_arrays(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Tensors by their Hugging Face name -> the model's parameters; see `fit.assemble`."""
    return assemble(name_table(config), tensors)
