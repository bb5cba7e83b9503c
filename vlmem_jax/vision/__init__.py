"""Vision towers: normalised pixels in, visual tokens of the decoder's width out."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx

from vlmem_jax.vision.intern_vit import InternViT, VisionConfig
from vlmem_jax.vision.patch_tower import Levels
from vlmem_jax.vision.pixels import normalise
from vlmem_jax.vision.projector import DeepMerger, FrameProjector, Merger, Projector, ProjectorConfig
from vlmem_jax.vision.qwen3_vit import Qwen3ViT, Qwen3ViTConfig
from vlmem_jax.vision.qwen_vit import QwenViT, QwenViTConfig
from vlmem_jax.vision.siglip import SigLIP, SigLIPConfig


class Tower(NamedTuple):
    """How a kind of tower, and the projector behind it, are made."""

    tower: Callable[..., nnx.Module]
    """`tower(config, attention, rngs=)`."""
    projector: Callable[..., nnx.Module]
    """`projector(config of the tower, config of the projector, width, rngs=)`."""


TOWERS = {
    "intern_vit": Tower(InternViT, lambda c, projector, width, rngs: Projector(projector, c.width, width, rngs=rngs)),
    "qwen_vit": Tower(
        QwenViT, lambda c, projector, width, rngs: Merger(c.merge**2, c.width, width, c.norm_eps, rngs=rngs)
    ),
    "qwen3_vit": Tower(
        Qwen3ViT,
        lambda c, projector, width, rngs: DeepMerger(
            c.merge**2, c.width, width, c.norm_eps, len(c.deep_layers), rngs=rngs
        ),
    ),
    "siglip": Tower(SigLIP, lambda c, projector, width, rngs: FrameProjector(c, width, rngs=rngs)),
}
"""By `vision.kind`."""

__all__ = [
    "TOWERS",
    "DeepMerger",
    "FrameProjector",
    "InternViT",
    "Levels",
    "Merger",
    "Projector",
    "ProjectorConfig",
    "Qwen3ViT",
    "Qwen3ViTConfig",
    "QwenViT",
    "QwenViTConfig",
    "SigLIP",
    "SigLIPConfig",
    "VisionConfig",
    "normalise",
]
