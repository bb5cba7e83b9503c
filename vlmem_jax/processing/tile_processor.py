"""Samples of models that see an image as square tiles and a thumbnail, and a video as images: InternVL, CoMemo."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.processing import chat, video
from vlmem_jax.processing.context import read_context
from vlmem_jax.processing.images import ImageConfig, tile_grid, write_tiles
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.types import TileGeometry, TileShape


class Grid(NamedTuple):
    """How an image, or a frame of a video and those that follow it unseen in the sequence, is cut into tiles."""

    cols: int
    rows: int
    frames: int = 1

    @property
    def cells(self) -> tuple[int, int]:
        """(columns, rows)"""
        return self.cols, self.rows


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a video, and those after it that do not stand in the sequence."""

    pictures: Sequence[Any]
    """The images or their (width, height), pixels."""


class TileProcessor(Processor):
    """Sees a tile as `geometry.tokens_per_side`**2 visual tokens. A frame of a video is one tile.

    What does not stand in the sequence has the position of what stands for it: the cell of the thumbnail, the mean, the
    frame before.
    """

    size_knobs = "image.max_tiles", "data.max_frames"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageConfig,
        geometry: TileGeometry,
        system: str | None = None,
        template: str = "internlm2-chat",
        whole: bool = True,
    ):
        context = read_context(image.context)
        super().__init__(tokenizer, system, template, context, whole)
        self.image = image
        self.tokens_per_side = geometry.tokens_per_side
        self._context_side = -(-geometry.tokens_per_side // context.pooled)
        self.tile = image.shows(TileShape(geometry.size, 3, geometry.tokens_per_side**2), whole)
        self.open_limit = image.max_pixels

    def choose_frames(
        self, clip: video.Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `video.choose_frames`."""
        return video.choose_frames(clip.frames, minimum, maximum, rng)

    def _laid_out(self, dialogue: chat.Dialogue) -> chat.Dialogue:
        """With `Frame1:` and the first frame to `FrameN:` and the last, a line each, for each video."""
        stride, whole = self.context.stride, self.whole
        messages = (tuple(piece for part in one for piece in lines(part, stride, whole)) for one in dialogue.messages)
        return dataclasses.replace(dialogue, messages=tuple(messages))

    def _grids(self, shown: Sequence, training: bool) -> list[Grid]:
        """In training the images of a sample share `image.max_tiles`; in a prompt each may take all."""
        most = self.image.max_tiles // max(len(shown), 1) if training else self.image.max_tiles
        if self.context.kind == "thumbnail" and not self.whole:
            most = 1
        return [self._grid(one, 1 if isinstance(one, Frame) else most) for one in shown]

    def _grid(self, one: Any, most: int) -> Grid:
        pictures = one.pictures if isinstance(one, Frame) else [one]
        width, height = pictures[0] if isinstance(pictures[0], tuple) else pictures[0].size
        return Grid(*tile_grid(width, height, self.tile.side, self.image, most), len(pictures))

    def _tiles(self, grid: Grid) -> int:
        return positions.tile_count(*grid.cells, self.image.thumbnail) * grid.frames

    def _in_context(self, grid: Grid) -> Grid:
        """What of a grid stands in the sequence."""
        return Grid(1, 1) if self.context.kind == "thumbnail" else grid._replace(frames=1)

    def _placeholders(self, grid: Grid) -> int:
        return self._tiles(self._in_context(grid)) * self._context_side**2

    def _place(self, tokens_T: np.ndarray, grids: Sequence[Grid], rope_dhr: bool | None) -> Placed:
        config = self.image
        positions_T, positions_C = positions.sequence_positions(
            tokens_T,
            [self._in_context(grid).cells for grid in grids],
            self._context_side,
            self.context_id,
            config.rope_dhr if rope_dhr is None else rope_dhr,
            config.dhr_map,
            config.thumbnail,
        )
        slots, owners, seen, there = [], [], 0, 0
        for grid in grids:
            owners.append(self._owners(grid) + there)
            first = there if self.tile.pooled else seen
            seen += len(owners[-1])
            if self.context.kind == "thumbnail":  # the last tile
                first = seen - self._placeholders(grid)
            slots.append(first + np.arange(self._placeholders(grid)))
            there += len(slots[-1])
        slot_C, owner_M = (np.concatenate([[], *parts]).astype(np.int32) for parts in (slots, owners))
        visual_positions_M = positions_C[owner_M]
        if self.tile.places > 1:
            places = [self._places(grid) for grid in grids]
            visual_positions_M = np.concatenate([[], *places]).astype(np.int32) + self.tile.places * visual_positions_M
        return Placed(positions_T, slot_C, visual_positions_M, pool_M=owner_M if self.tile.pooled else None)

    def _owners(self, grid: Grid) -> np.ndarray:
        """Of each visual token of a grid, the token in the sequence that stands for it."""
        side, tiles = self.tokens_per_side, self._tiles(grid)
        if self.context.kind == "thumbnail":
            return positions.dhr_map(*grid.cells, side, 0, self.image.dhr_map, self.image.thumbnail)
        each, shown = self._context_side, self._placeholders(grid) // self._context_side**2
        y, x = np.indices((side, side)) // self.context.pooled
        return (np.arange(tiles)[:, None] % shown * each**2 + (y * each + x).reshape(-1)).reshape(-1)

    def _places(self, grid: Grid) -> np.ndarray:
        """Of each visual token of a grid, its place among those that share its position."""
        k, side, tiles = self.context.pooled, self.tokens_per_side, self._tiles(grid)
        if grid.frames > 1:
            return np.repeat(positions.spread_places(np.arange(tiles), tiles), side * side)
        if k > 1:
            y, x = np.indices((side, side)) % k
            return np.tile(positions.spread_places((y * k + x).reshape(-1), k * k), tiles)
        return positions.fine_places(*grid.cells, side, self.image.thumbnail)

    def _cut(self, picture: Image.Image | Frame, grid: Grid, out_ISSc: np.ndarray) -> None:
        if not isinstance(picture, Frame):
            return write_tiles(picture, grid.cells, out_ISSc)
        for n, frame in enumerate(picture.pictures):
            write_tiles(frame, grid.cells, out_ISSc[n : n + 1])


def lines(part: chat.Part, stride: int = 1, whole: bool = True) -> list[chat.Part]:
    """A part as it is, but every `stride`-th frame of a video as an image, a line each; `whole`: with the others."""
    if not isinstance(part, video.Video | video.VideoSize):
        return [part]
    pictures = [part[1:3]] * part.frames if isinstance(part, video.VideoSize) else part.frames
    groups = [pictures[first : first + (stride if whole else 1)] for first in range(0, len(pictures), stride)]
    return [
        piece
        for n, group in enumerate(groups, 1)
        for piece in (f"Frame{n}:" if n == 1 else f"\nFrame{n}:", Frame(group))
    ]
