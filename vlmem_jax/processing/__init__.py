"""From files and text to model inputs: images, video, tokenizers, chat templates."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import build_kind
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.patch_processor import PatchProcessor
from vlmem_jax.processing.patches import PatchConfig
from vlmem_jax.processing.processor import Processor, SampleSize
from vlmem_jax.processing.tile_processor import TileProcessor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Video
from vlmem_jax.types import PatchGeometry, TileGeometry

__all__ = [
    "ImageConfig",
    "PatchConfig",
    "PatchProcessor",
    "SampleSize",
    "Processor",
    "TileProcessor",
    "Tokenizer",
    "Video",
    "image_config",
    "make_processor",
]


def image_config(fields: Mapping[str, Any], where: str = "image") -> ImageConfig | PatchConfig:
    """The config of images that a dict holds, by its key `kind`. Raises ConfigError, which names the key."""
    return build_kind((ImageConfig, PatchConfig), fields, where)


def make_processor(
    tokenizer: Tokenizer,
    image: ImageConfig | PatchConfig,
    geometry: TileGeometry | PatchGeometry,
    system: str | None = None,
    template: str = "internlm2-chat",
) -> Processor:
    """The processor for a model of this `geometry`. Raises ValueError where the config of images is not for it."""
    kind = "patches" if isinstance(geometry, PatchGeometry) else "tiles"
    if image.kind != kind:
        raise ValueError(f"image.kind must be {kind} for this model.vision, got {image.kind}")
    if isinstance(geometry, PatchGeometry):
        return PatchProcessor(tokenizer, image, geometry, system, template)
    if image.size != geometry.size:
        raise ValueError(f"image.size {image.size} must equal model.vision.image_size {geometry.size}, in pixels")
    return TileProcessor(tokenizer, image, geometry.tokens_per_side, system, template)
