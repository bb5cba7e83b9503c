"""Vision towers: normalised pixels in, visual tokens of the decoder's width out."""

from vlmem_jax.vision.intern_vit import InternViT, VisionConfig
from vlmem_jax.vision.pixels import normalise
from vlmem_jax.vision.projector import Projector, ProjectorConfig

__all__ = ["InternViT", "Projector", "ProjectorConfig", "VisionConfig", "normalise"]
