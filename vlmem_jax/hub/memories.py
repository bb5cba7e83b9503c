"""What a memory has in a checkpoint, whatever the family: its tensor names, and what config.json tells of it."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.memory import MEMORIES
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.records import Rule
from vlmem_jax.trees import flatten


def rules(config: ModelConfig, layer: str) -> list[Rule]:
    """The memory's part of a name table; `layer` is the name of a decoder layer, with {} for its number."""
    if config.memory == "none":
        return []
    leaves = flatten(VLM(config).abstract()["memory"])
    return MEMORIES[config.memory].tensors(getattr(config, config.memory), config.decoder, leaves, layer)


def read(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keys of the model that a config.json tells; `shapes` of the checkpoint's tensors fill in what it leaves out."""
    for name, memory in MEMORIES.items():
        if (found := memory.read_config(content, shapes)) is not None:
            return {"memory": name, name: found}
    return {"memory": "none"}


def write(model: ModelConfig) -> dict[str, Any]:
    """What config.json tells of a model's memory."""
    if model.memory == "none":
        return {}
    return MEMORIES[model.memory].write_config(getattr(model, model.memory), model.decoder)
