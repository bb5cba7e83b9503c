"""InternVL2 with an InternLM2 decoder (arXiv 2404.16821): sizes, tensor names, config.json."""

from collections.abc import Iterable, Mapping
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
from vlmem_jax.memory import memory_of
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing.chat import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import Rule, check_fixed, check_needed, ours, section, theirs

TEMPLATE = "internlm2-chat"

_INTERN_VIT_300M = dict(width=1024, layers=24, heads=16, mlp_width=4096, image_size=448, patch_size=14, drop_path=0.1)
_INTERNLM2 = dict(vocab=92553, head_dim=128, rope_theta=1e6, ntk_factor=2.0, max_positions=32768)

SIZES: dict[str, dict[str, Any]] = {
    # CoMemo, arXiv 2506.06279. The widths of its memory blocks are not published: those here are assumed.
    "comemo_2b": dict(
        vision=_INTERN_VIT_300M,
        decoder=dict(_INTERNLM2, width=2048, layers=24, heads=16, kv_heads=8, mlp_width=8192),
        memory="comemo",
        memories=dict(comemo=dict(every=4, heads=16, head_dim=128, mlp_width=8192)),
    ),
    "comemo_9b": dict(
        vision=_INTERN_VIT_300M,
        decoder=dict(_INTERNLM2, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336),
        memory="comemo",
        memories=dict(comemo=dict(every=4, heads=16, head_dim=128, mlp_width=16384)),
    ),
    # reads mosaics of handwritten digits: 9 visual tokens a tile of 24 px. So few positions want a small base of angles
    "digits": dict(
        vision=dict(width=64, layers=2, heads=2, mlp_width=192, image_size=24, patch_size=4),
        decoder=dict(
            vocab=128, width=96, layers=4, heads=3, kv_heads=3, head_dim=32, mlp_width=240, rope_theta=500.0,
        ),
        memory="comemo",
        memories=dict(comemo=dict(every=2, heads=3, head_dim=32, mlp_width=192, rope_theta=500.0)),
        compute_dtype="float32",
    ),
    # as small as it can be with every part in place
    "tiny": dict(
        vision=dict(width=32, layers=2, heads=4, mlp_width=64, image_size=28, patch_size=7),
        decoder=dict(vocab=128, width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp_width=96),
        memory="comemo",
        memories=dict(
            comemo=dict(every=2, heads=4, head_dim=16, mlp_width=80),
            vlm2=dict(working=2, episodic=3, heads=4, geometry_width=12, view_width=6),
        ),
        compute_dtype="float32",
    ),
}  # fmt: skip
"""Models by name: released ones with the memory that they were released with, and small ones."""

# --- tensors ----------------------------------------------------------------------------------------------------------

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
        wrapped = memory_of(config.memory).wraps_layers
    rules = _vision(config.vision) + _projector(config) + _decoder(config.decoder, NESTED * wrapped, vocab)
    return rules + memory_tensors(config, LAYER)


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


# --- config.json ------------------------------------------------------------------------------------------------------

# Our key -> theirs. A key of theirs that is left out gets our default, which is what the released models have.
VISION = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm": "norm_type",
    "norm_eps": "layer_norm_eps",
    "qk_norm": "qk_normalization",
    "layer_scale_init": "initializer_factor",
    "drop_path": "drop_path_rate",
}
DECODER = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
}
IMAGE = {
    "min_tiles": "min_dynamic_patch",
    "max_tiles": "max_dynamic_patch",
    "thumbnail": "use_thumbnail",
}
FIXED = {
    "template": TEMPLATE,
    "downsample_ratio": 0.5,
    "vision_config.hidden_act": "gelu",
    "vision_config.qkv_bias": True,
    "llm_config.architectures": ["InternLM2ForCausalLM"],
    "llm_config.hidden_act": "silu",
    "llm_config.bias": False,
    "llm_config.tie_word_embeddings": False,
}
"""Keys with one supported value."""


def read_config(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Released:
    """From a parsed config.json; `shapes` of the checkpoint's tensors fill in what it leaves out.

    Raises ValueError naming the key that is missing, or has a value that is not supported.
    """
    check_fixed(FIXED, content)
    tower, language = content.get("vision_config", {}), content.get("llm_config", {})
    vision, decoder = ours(VISION, tower), ours(DECODER, language)
    image = ours(IMAGE, content) | read_image(content)
    stored = vision.get("image_size")
    vision["image_size"] = content.get("force_image_size") or stored
    check_needed("vision_config", VISION, vision, "width layers heads mlp_width image_size patch_size")
    check_needed("llm_config", DECODER, decoder, "vocab width layers heads mlp_width")
    if stored and stored != vision["image_size"]:
        vision["position_grid"] = stored // vision["patch_size"]
    if "select_layer" in content:
        vision["select_layer"] = content["select_layer"]
    decoder = {"kv_heads": decoder["heads"], "head_dim": decoder["width"] // decoder["heads"]} | decoder
    scaling = language.get("rope_scaling") or {"type": "dynamic", "factor": 0.0}
    if scaling.get("type") != "dynamic":
        raise ValueError(f"llm_config.rope_scaling of config.json must be null or of type dynamic; got {scaling}")
    decoder["ntk_factor"] = scaling["factor"]
    if content.get("dynamic_image_size") is False:
        image["min_tiles"] = image["max_tiles"] = 1
    model = {"vision": vision, "decoder": decoder} | read_memory(content, shapes)
    model |= {"projector": {"shuffle": content["ps_version"]}} if "ps_version" in content else {}
    model |= {"compute_dtype": "float32"} if content.get("torch_dtype") == "float32" else {}
    return Released(build(ModelConfig, model, "config.json"), build(ImageConfig, image, "config.json"))


def write_config(model: ModelConfig, image: ImageConfig, dtype: str) -> dict[str, Any]:
    """The config.json of such a model whose tensors are of `dtype`."""
    vision, decoder = model.vision, model.decoder
    stored = (vision.position_grid or vision.grid) * vision.patch_size
    scaling = {"type": "dynamic", "factor": decoder.ntk_factor} if decoder.ntk_factor else None
    content = {
        "model_type": "internvl_chat",
        "torch_dtype": dtype,
        "vision_config": {"model_type": "intern_vit_6b"} | theirs(VISION, vision) | {"image_size": stored},
        "llm_config": {"model_type": "internlm2"} | theirs(DECODER, decoder) | {"rope_scaling": scaling},
        "select_layer": vision.select_layer,
        "ps_version": model.projector.shuffle,
        "dynamic_image_size": image.max_tiles > 1,
        "force_image_size": vision.image_size,
    }
    content |= theirs(IMAGE, image) | write_image(image, IMAGE) | write_memory(model)
    for key, value in FIXED.items():
        *section, name = key.split(".")
        (content[section[0]] if section else content)[name] = value
    return content


def _files(
    model: ModelConfig, image: ImageConfig, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    return {CONFIG_FILE: write_config(model, image, dtype)}


FAMILY = Family(
    tower="intern_vit",
    image=ImageConfig,
    template=TEMPLATE,
    name_table=name_table,
    layout=is_wrapped,
    read_config=lambda content, shapes, preprocessor: read_config(content, shapes),
    write_files=_files,
    sizes=SIZES,
    added_tokens=(IMAGE_START, IMAGE_END, IMAGE_CONTEXT, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
)
