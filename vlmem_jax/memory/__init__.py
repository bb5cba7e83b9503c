"""Memories that live inside a model. A new one is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build_kind
from vlmem_jax.memory.base import (
    Attend,
    Decode,
    Frame,
    Memory,
    MemoryConfig,
    See,
    Speak,
    Speech,
    ThroughTower,
    TokenStart,
)
from vlmem_jax.memory.comemo import CoMemo, CoMemoConfig
from vlmem_jax.memory.vismem import VisMem, VisMemConfig
from vlmem_jax.memory.vlm2 import VLM2, VLM2Config

MEMORIES: dict[str, type[Memory]] = {memory.config_type.kind: memory for memory in (CoMemo, VisMem, VLM2)}
"""By `model.memory.kind`."""

__all__ = [
    "MEMORIES",
    "Attend",
    "CoMemo",
    "CoMemoConfig",
    "Decode",
    "Frame",
    "Memory",
    "MemoryConfig",
    "See",
    "Speak",
    "Speech",
    "ThroughTower",
    "TokenStart",
    "VLM2",
    "VLM2Config",
    "VisMem",
    "VisMemConfig",
    "memory_config",
    "memory_of",
]


def memory_of(config: MemoryConfig | None) -> type[Memory]:
    """The class of the memory with this config; without one, Memory, which is at no door."""
    return Memory if config is None else MEMORIES[config.kind]


def memory_config(value: Mapping[str, Any], where: str = "config.model.memory") -> MemoryConfig:
    """The config that a group of keys stands for, by its `kind`. Raises ConfigError, naming the key."""
    return build_kind([memory.config_type for memory in MEMORIES.values()], value, where)
