"""From files and text to model inputs: images, video, tokenizers, chat templates."""

from vlmem_jax.processing.frames import FrameConfig, FrameProcessor
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.patch_processor import PatchProcessor
from vlmem_jax.processing.patches import PatchConfig
from vlmem_jax.processing.processor import Processor, SampleSize
from vlmem_jax.processing.steps import StepConfig, StepProcessor
from vlmem_jax.processing.tile_processor import TileProcessor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Video
from vlmem_jax.types import FrameGeometry, PatchGeometry, StepGeometry, TileGeometry, TileShape

__all__ = [
    "AnyImageConfig",
    "FrameConfig",
    "FrameProcessor",
    "ImageConfig",
    "PatchConfig",
    "PatchProcessor",
    "SampleSize",
    "Processor",
    "StepConfig",
    "StepProcessor",
    "TileProcessor",
    "Tokenizer",
    "Video",
    "make_processor",
]


AnyImageConfig = ImageConfig | PatchConfig | StepConfig | FrameConfig
"""How images become what a tower takes: tiles, patches or frames."""
KINDS = {
    TileGeometry: (ImageConfig, TileProcessor),
    PatchGeometry: (PatchConfig, PatchProcessor),
    StepGeometry: (StepConfig, StepProcessor),
    FrameGeometry: (FrameConfig, FrameProcessor),
}
"""By what making tiles for a tower needs to know."""


def make_processor(
    tokenizer: Tokenizer,
    image: AnyImageConfig,
    geometry: TileGeometry | PatchGeometry | FrameGeometry,
    system: str | None = None,
    template: str = "internlm2-chat",
    whole: bool = True,
    tile: TileShape | None = None,
) -> Processor:
    """The processor for a model of this `geometry`; `whole` as in `Processor`. `tile`: as `VLM.tile_of` tells it, where
    the model has a memory that reads more than pixels.

    Raises ValueError where the config of images is not for it.
    """
    wanted, processor = KINDS[type(geometry)]
    if not isinstance(image, wanted):
        raise ValueError(f"the config of images must be {wanted.__name__} for this tower, got {type(image).__name__}")
    made = processor(tokenizer, image, geometry, system, template, whole)
    if tile is not None:
        made.tile = tile
    return made
