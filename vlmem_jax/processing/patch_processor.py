"""Samples of models that see images and videos in their own size, cut into patches: Qwen2.5-VL."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing import patches
from vlmem_jax.processing.images import PILLOW_PIXEL_LIMIT
from vlmem_jax.processing.patches import PatchConfig
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Clip, Video, VideoSize
from vlmem_jax.types import PatchGeometry, TileShape


class PatchProcessor(Processor):
    """A tile is a block of patches and becomes one visual token; blocks come window after window."""

    open_limit = PILLOW_PIXEL_LIMIT
    size_knobs = "image.max_pixels", "image.total_pixels or image.max_frames"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: PatchConfig,
        geometry: PatchGeometry,
        system: str | None = None,
        template: str = "qwen2-vl",
    ):
        super().__init__(tokenizer, system, template)
        if not self.template.video:
            raise ValueError(
                f"a model that sees patches needs a template with videos, such as qwen2-vl; got {template}"
            )
        self.image = image
        self.geometry = geometry
        channels = 3 * geometry.frames * geometry.size**2
        self.tile = TileShape(geometry.merge, channels, tokens=1, layout=True, axes=3)

    def choose_frames(
        self, clip: Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `patches.choose_frames`: image.fps decides, not the arguments."""
        return patches.choose_frames(clip, self.image, self.geometry)

    def frames_at(self, clip: Clip, fps: float) -> list[int]:
        return patches.choose_frames(clip, dataclasses.replace(self.image, fps=fps), self.geometry)

    def _grids(self, shown: Sequence, training: bool) -> list[PatchGrid]:
        sizes = [item if isinstance(item, tuple) else item.size for item in shown]
        return [
            patches.video_grid(size, self.image, self.geometry)
            if isinstance(size, VideoSize)
            else patches.image_grid(*size, self.image, self.geometry)
            for size in sizes
        ]

    def _tiles(self, grid: PatchGrid) -> int:
        return grid.tokens

    def _place(self, tokens_T: np.ndarray, grids: Sequence[PatchGrid], rope_dhr: bool | None) -> Placed:
        if rope_dhr is not None:
            raise ValueError("rope_dhr is for images cut into tiles; leave it out for this model")
        return place(tokens_T, grids, (self.context_id, self.video_id), self.geometry)

    def _cut(self, picture: Image.Image | Video, grid: PatchGrid, out_ISSc: np.ndarray) -> None:
        frames = picture.frames if isinstance(picture, Video) else [picture]
        order_N, _ = positions.window_order(grid._replace(frames=1), self.geometry.window)
        patches.write_blocks(frames, grid, order_N, self.geometry, out_ISSc)


def place(
    tokens_T: np.ndarray, grids: Sequence[PatchGrid], placeholders: tuple[int, int], geometry: PatchGeometry
) -> Placed:
    """Positions of a sequence whose `placeholders` (ids for images and for videos) show `grids`, in order."""
    positions_T3 = positions.mrope_positions(tokens_T, grids, placeholders, geometry.tokens_per_second)
    total = sum(grid.tokens for grid in grids)
    order_M, layout_M4 = np.empty(total, np.int32), np.empty((total, 4), np.int32)
    end = 0
    for grid in grids:
        start, end = end, end + grid.tokens
        order_M[start:end], layout_M4[start:end] = positions.window_order(grid, geometry.window)
        order_M[start:end] += start
        layout_M4[start:end, :2] += start
    shown_M3 = positions_T3[np.isin(tokens_T, placeholders)]
    return Placed(positions_T3, np.argsort(order_M).astype(np.int32), shown_M3[order_M], layout_M4)
