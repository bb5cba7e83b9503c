"""Memories that live inside a model, by config name. A new one is one file and one line here."""

from vlmem_jax.memory.base import Memory, VisualTokens
from vlmem_jax.memory.comemo import CoMemo, CoMemoConfig

MEMORIES: dict[str, type[Memory]] = {"comemo": CoMemo}
"""`model.memory` -> class; "none" builds no memory at all."""

__all__ = ["MEMORIES", "CoMemo", "CoMemoConfig", "Memory", "VisualTokens"]
