"""Memories that live inside a model, by config name. A new one is one file and one line here."""

from vlmem_jax.memory.base import Attend, Decode, Memory, Speak, Speech, ThroughTower, TokenStart
from vlmem_jax.memory.comemo import CoMemo, CoMemoConfig
from vlmem_jax.memory.vismem import VisMem, VisMemConfig

MEMORIES: dict[str, type[Memory]] = {"comemo": CoMemo, "vismem": VisMem}
"""`model.memory` -> class; "none" builds no memory at all."""

__all__ = [
    "MEMORIES",
    "Attend",
    "CoMemo",
    "CoMemoConfig",
    "Decode",
    "Memory",
    "Speak",
    "Speech",
    "ThroughTower",
    "TokenStart",
    "VisMem",
    "VisMemConfig",
]
