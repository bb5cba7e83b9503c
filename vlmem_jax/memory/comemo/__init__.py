"""CoMemo: blocks between decoder layers that read all visual tokens."""

from vlmem_jax.memory.comemo.blocks import CoMemo
from vlmem_jax.memory.comemo.config import CoMemoConfig

__all__ = ["CoMemo", "CoMemoConfig"]
