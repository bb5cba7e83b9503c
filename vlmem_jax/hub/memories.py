"""What a memory has in a checkpoint, whatever the family: its tensor names, and what config.json tells of it."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.hub import comemo, vismem
from vlmem_jax.hub.rules import Rule
from vlmem_jax.models import ModelConfig

MEMORIES = {"comemo": comemo, "vismem": vismem}


def rules(config: ModelConfig, layer: str) -> list[Rule]:
    """The memory's part of a name table; `layer` is the name of a decoder layer, with {} for its number."""
    return [] if config.memory == "none" else MEMORIES[config.memory].rules(config, layer)


def read(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keys of the model that a config.json tells; `shapes` of the checkpoint's tensors fill in what it leaves out."""
    for name, memory in MEMORIES.items():
        if (found := memory.read(content, shapes)) is not None:
            return {"memory": name, name: found}
    return {"memory": "none"}


def write(model: ModelConfig) -> dict[str, Any]:
    """What config.json tells of a model's memory."""
    return {} if model.memory == "none" else MEMORIES[model.memory].write(model)
