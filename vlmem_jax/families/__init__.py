"""The families of backbones, by `model_type` of their config.json. A new one is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from vlmem_jax.config import ConfigError, build, overlay
from vlmem_jax.families import internvl, llava_video, qwen2_5_vl, qwen3_vl
from vlmem_jax.families.base import PREPROCESSOR_FILE, VIDEO_FILE, Family, Released
from vlmem_jax.memory import MEMORIES, MemoryConfig, memory_config
from vlmem_jax.models import ModelConfig

__all__ = [
    "FAMILIES",
    "PREPROCESSOR_FILE",
    "PRESETS",
    "VIDEO_FILE",
    "Family",
    "Released",
    "of_config",
    "of_model",
    "resolve",
]

FAMILIES = {
    "internvl_chat": internvl.FAMILY,
    "qwen2_5_vl": qwen2_5_vl.FAMILY,
    "qwen3_vl": qwen3_vl.FAMILY,
    "llava_qwen": llava_video.FAMILY,
}
PRESETS = {name: keys for family in FAMILIES.values() for name, keys in family.sizes.items()}
"""Keys of `config.model` by the name of a model. A config names one and changes what it must."""


def of_model(model: ModelConfig) -> Family:
    """The family that a model's tower belongs to."""
    return next(family for family in FAMILIES.values() if family.tower == model.vision.kind)


def of_config(content: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json. Raises ValueError with those there are."""
    kind = content.get("model_type", "internvl_chat")
    if kind not in FAMILIES:
        raise ValueError(f"model_type of config.json must be one of {', '.join(FAMILIES)}; got {kind!r}")
    return FAMILIES[kind]


def resolve(config: ConfigDict | Mapping[str, Any], where: str = "config.model") -> ModelConfig:
    """ModelConfig from `config.preset` (optional) overlaid with the other keys of `config`.

    `memory` is a group of keys, its kind alone, or none; a preset has sizes for some kinds. Raises ConfigError (a
    ValueError) that names the key: unknown preset or key, wrong type, value out of range.
    """
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    name = given.pop("preset", None)
    if name is not None and name not in PRESETS:
        raise ConfigError(f"{where}.preset must be one of {', '.join(PRESETS)}; got {name!r}")
    for kind in set(MEMORIES) & set(given):
        raise ConfigError(
            f"{where}.{kind} is no key any more: the keys of a memory stand in {where}.memory, beside its kind; "
            f"write memory=dict(kind={kind!r}, ...), or --config.model.memory.KEY=VALUE"
        )
    sizes = dict(PRESETS.get(name, {}))
    memory = _memory(given.pop("memory", {}), sizes.pop("memory", None), sizes.pop("memories", {}), f"{where}.memory")
    return build(ModelConfig, overlay(sizes, given) | {"memory": memory}, where)


def _memory(given: Any, kind: str | None, sizes: Mapping[str, Mapping], where: str) -> MemoryConfig | None:
    """The memory that `given` asks for, of `kind` if it does not say; `sizes` has the keys of kinds."""
    if given is None or isinstance(given, MemoryConfig):
        return given
    keys = {"kind": given} if isinstance(given, str) else {"kind": kind, **given}
    if keys["kind"] in (None, "none"):
        if len(keys) > 1:
            raise ConfigError(f"{where}.kind must be one of {', '.join(MEMORIES)}, whose keys these are: {given}")
        return None
    return memory_config(overlay(sizes.get(keys["kind"], {}), keys), where)
