"""Vision towers: normalised pixels in, visual tokens of the decoder's width out."""

from vlmem_jax.vision.intern_vit import InternViT, VisionConfig
from vlmem_jax.vision.pixels import normalise
from vlmem_jax.vision.projector import Merger, Projector, ProjectorConfig
from vlmem_jax.vision.qwen_vit import QwenViT, QwenViTConfig

__all__ = [
    "InternViT",
    "Merger",
    "Projector",
    "ProjectorConfig",
    "QwenViT",
    "QwenViTConfig",
    "VisionConfig",
    "normalise",
]
