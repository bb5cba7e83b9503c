"""Memories that live inside a model. A new one is one file and one line here."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build_kind
from vlmem_jax.memory.base import (
    Attend,
    Decode,
    Memory,
    MemoryConfig,
    Speak,
    Speech,
    ThroughTower,
    TokenStart,
)
from vlmem_jax.memory.comemo import CoMemo, CoMemoConfig
from vlmem_jax.memory.vismem import VisMem, VisMemConfig

MEMORIES: dict[str, type[Memory]] = {memory.config_type.kind: memory for memory in (CoMemo, VisMem)}
"""By `model.memory.kind`."""

__all__ = [
    "MEMORIES",
    "Attend",
    "CoMemo",
    "CoMemoConfig",
    "Decode",
    "Memory",
    "MemoryConfig",
    "Speak",
    "Speech",
    "ThroughTower",
    "TokenStart",
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
