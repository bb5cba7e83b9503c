"""VisMem: latent memories, formed and inserted while an answer is written."""

from vlmem_jax.memory.vismem.config import VisMemConfig
from vlmem_jax.memory.vismem.latent import VisMem

__all__ = ["VisMem", "VisMemConfig"]
