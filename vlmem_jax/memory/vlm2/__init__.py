"""VLM^2 (arXiv 2511.20644): frames of a video that know their place in space, and two banks of them of fixed size."""

from vlmem_jax.memory.vlm2.config import VLM2Config
from vlmem_jax.memory.vlm2.memory import VLM2

__all__ = ["VLM2", "VLM2Config"]
