"""Keys of a released config.json and of our configs: what the families have in common."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import ImageConfig, PatchConfig


@dataclasses.dataclass(frozen=True)
class Released:
    """What a released config.json says."""

    model: ModelConfig
    image: ImageConfig | PatchConfig
    template: str


def ours(names: Mapping[str, str], section: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of what a section says; `names` maps our key to theirs."""
    return {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}


def theirs(names: Mapping[str, str], config: Any) -> dict[str, Any]:
    """Their keys of what our dataclass says."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def check_needed(section: str, names: Mapping[str, str], found: Mapping[str, Any], needed: str) -> None:
    """Raises ValueError naming the keys that are needed and missing."""
    missing = [f"{section}.{names[key]}".lstrip(".") for key in needed.split() if found.get(key) is None]
    if missing:
        raise ValueError(f"config.json must have {', '.join(missing)}")


def check_fixed(fixed: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raises ValueError where a key, `section.key` or `key`, is there and has another value than the supported one."""
    wrong = []
    for key, value in fixed.items():
        *section, name = key.split(".")
        found = (content.get(section[0], {}) if section else content).get(name, value)
        if found != value:
            wrong.append(f"{key} must be {value!r}, got {found!r}")
    if wrong:
        raise ValueError(f"config.json describes a model that is not supported: {'; '.join(wrong)}")
