"""config.json of InternVL2 (with an InternLM2 decoder), with any memory <-> our model and image configs."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build
from vlmem_jax.hub import memories
from vlmem_jax.hub.settings import Released
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing.chat import TEMPLATES
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.records import check_fixed, check_needed, ours, theirs

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
    "size": "force_image_size",
    "min_tiles": "min_dynamic_patch",
    "max_tiles": "max_dynamic_patch",
    "thumbnail": "use_thumbnail",
}
FIXED = {
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
    image = ours(IMAGE, content)
    stored = vision.get("image_size")
    image["size"] = vision["image_size"] = image.get("size") or stored
    check_needed("vision_config", VISION, vision, "width layers heads mlp_width image_size patch_size")
    check_needed("llm_config", DECODER, decoder, "vocab width layers heads mlp_width")
    if stored and stored != image["size"]:
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
    template = content.get("template", "internlm2-chat")
    known = [name for name, chat in TEMPLATES.items() if chat.video is None]
    if template not in known:
        raise ValueError(f"template of config.json must be one of {', '.join(known)}; got {template!r}")
    model = {"vision": vision, "decoder": decoder} | memories.read(content, shapes)
    model |= {"projector": {"shuffle": content["ps_version"]}} if "ps_version" in content else {}
    model |= {"compute_dtype": "float32"} if content.get("torch_dtype") == "float32" else {}
    return Released(build(ModelConfig, model, "config.json"), build(ImageConfig, image, "config.json"), template)


def write_config(model: ModelConfig, image: ImageConfig, template: str, dtype: str) -> dict[str, Any]:
    """The config.json of such a model whose tensors are of `dtype`."""
    vision, decoder = model.vision, model.decoder
    stored = (vision.position_grid or vision.grid) * vision.patch_size
    scaling = {"type": "dynamic", "factor": decoder.ntk_factor} if decoder.ntk_factor else None
    content = {
        "model_type": "internvl_chat",
        "torch_dtype": dtype,
        "template": template,
        "vision_config": {"model_type": "intern_vit_6b"} | theirs(VISION, vision) | {"image_size": stored},
        "llm_config": {"model_type": "internlm2"} | theirs(DECODER, decoder) | {"rope_scaling": scaling},
        "select_layer": vision.select_layer,
        "ps_version": model.projector.shuffle,
        "dynamic_image_size": image.max_tiles > 1,
    }
    content |= theirs(IMAGE, image) | memories.write(model)
    for key, value in FIXED.items():
        *section, name = key.split(".")
        (content[section[0]] if section else content)[name] = value
    return content
