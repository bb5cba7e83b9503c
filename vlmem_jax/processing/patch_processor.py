"""Samples of models that see images and videos in their own size, cut into patches: Qwen2.5-VL."""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing import patches
from vlmem_jax.processing.context import read_context
from vlmem_jax.processing.images import PILLOW_PIXEL_LIMIT
from vlmem_jax.processing.patches import PatchConfig
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Clip, Video, VideoSize
from vlmem_jax.types import PatchGeometry, TileShape


class PatchProcessor(Processor):
    """A tile is a block of patches and becomes one visual token; blocks come window after window.

    What does not stand in the sequence has the position of what stands for it: the mean, or the step of time before.
    """

    open_limit = PILLOW_PIXEL_LIMIT
    size_knobs = "image.max_pixels", "image.total_pixels or image.max_frames"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: PatchConfig,
        geometry: PatchGeometry,
        system: str | None = None,
        template: str = "qwen2-vl",
        whole: bool = True,
    ):
        super().__init__(tokenizer, system, template, read_context(image.context), whole)
        if not self.template.video:
            raise ValueError(
                f"a model that sees patches needs a template with videos, such as qwen2-vl; got {template}"
            )
        self.image = image
        self.geometry = geometry
        channels = 3 * geometry.frames * geometry.size**2
        self.tile = image.shows(TileShape(geometry.merge, channels, tokens=1, layout=True, axes=3), whole)

    def choose_frames(
        self, clip: Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `patches.choose_frames`: image.fps decides, not the arguments."""
        return patches.choose_frames(clip, self.image, self.geometry)

    def frames_at(self, clip: Clip, fps: float) -> list[int]:
        return patches.choose_frames(clip, dataclasses.replace(self.image, fps=fps), self.geometry)

    def limited(self, tokens: int) -> "PatchProcessor":
        if not tokens:
            return self
        each = (self.geometry.factor * self._thinning[1]) ** 2
        most = min(self.image.max_pixels, tokens * each)
        made = copy.copy(self)
        made.image = dataclasses.replace(self.image, max_pixels=most, min_pixels=min(self.image.min_pixels, most))
        return made

    def _grids(self, shown: Sequence, training: bool) -> list[PatchGrid]:
        sizes = [item if isinstance(item, tuple) else item.size for item in shown]
        grids = [
            patches.video_grid(size, self.image, self.geometry)
            if isinstance(size, VideoSize)
            else patches.image_grid(*size, self.image, self.geometry)
            for size in sizes
        ]
        return grids if self.whole else [grid.thinned(self.context.stride) for grid in grids]

    def _tiles(self, grid: PatchGrid) -> int:
        return grid.tokens

    @property
    def _thinning(self) -> tuple[int, int]:
        """Stride and k of what stands in the sequence, among what is seen."""
        return self.context.stride if self.whole else 1, self.context.pooled

    def _placeholders(self, grid: PatchGrid) -> int:
        return grid.thinned(*self._thinning).tokens

    def _place(self, tokens_T: np.ndarray, grids: Sequence[PatchGrid], rope_dhr: bool | None) -> Placed:
        if rope_dhr is not None:
            raise ValueError("rope_dhr is for images cut into tiles; leave it out for this model")
        return place(tokens_T, grids, (self.context_id, self.video_id), self.geometry, *self._thinning)

    def _cut(self, picture: Image.Image | Video, grid: PatchGrid, out_ISSc: np.ndarray) -> None:
        frames = picture.frames if isinstance(picture, Video) else [picture]
        if not self.whole:
            depth = self.geometry.frames
            steps = range(0, len(frames), depth * self.context.stride)
            frames = [frame for first in steps for frame in frames[first : first + depth]]
        order_N, _ = positions.window_order(grid._replace(frames=1), self.geometry.window)
        patches.write_blocks(frames, grid, order_N, self.geometry, out_ISSc)


def place(
    tokens_T: np.ndarray,
    grids: Sequence[PatchGrid],
    placeholders: tuple[int, int],
    geometry: PatchGeometry,
    stride: int = 1,
    k: int = 1,
) -> Placed:
    """Positions of a sequence whose `placeholders` (ids for images and for videos) show `grids`, in order, or what
    `PatchGrid.thinned` leaves of them."""
    shown = [grid.thinned(stride, k) for grid in grids]
    positions_T3 = positions.mrope_positions(tokens_T, shown, placeholders, geometry.tokens_per_second)
    total = sum(grid.tokens for grid in grids)
    order_M, layout_M4 = np.empty(total, np.int32), np.empty((total, 4), np.int32)
    owners, slots, end, there = [], [], 0, 0
    for grid, part in zip(grids, shown, strict=True):
        start, end = end, end + grid.tokens
        order_M[start:end], layout_M4[start:end] = positions.window_order(grid, geometry.window)
        order_M[start:end] += start
        layout_M4[start:end, :2] += start
        owner_M, first_C = grid.owners(stride, k)
        owners.append(owner_M + there)
        slots.append(np.arange(part.tokens) + there if k > 1 else first_C + start)
        there += part.tokens
    owner_M, slot_C = (np.concatenate([[], *parts]).astype(np.int32) for parts in (owners, slots))
    owner_M, shown_C3 = owner_M[order_M], positions_T3[np.isin(tokens_T, placeholders)]
    slot_C = slot_C if k > 1 else np.argsort(order_M).astype(np.int32)[slot_C]
    return Placed(positions_T3, slot_C, shown_C3[owner_M], layout_M4, owner_M if k > 1 else None)
