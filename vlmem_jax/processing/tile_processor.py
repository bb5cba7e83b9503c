"""Samples of models that see an image as square tiles and a thumbnail, and a video as images: InternVL, CoMemo."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.processing import chat, video
from vlmem_jax.processing.images import ImageConfig, tile_grid, write_tiles
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.types import TileGeometry, TileShape

Grid = tuple[int, int]
"""Columns and rows of tiles."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame of a video."""

    picture: Any
    """The image or its (width, height), pixels."""


class TileProcessor(Processor):
    """Sees a tile as `geometry.tokens_per_side`**2 visual tokens. A frame of a video is one tile."""

    size_knobs = "image.max_tiles", "data.max_frames"

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageConfig,
        geometry: TileGeometry,
        system: str | None = None,
        template: str = "internlm2-chat",
    ):
        super().__init__(tokenizer, system, template)
        self.image = image
        self.tokens_per_side = geometry.tokens_per_side
        self.tile = TileShape(geometry.size, 3, geometry.tokens_per_side**2)
        self.open_limit = image.max_pixels

    def choose_frames(
        self, clip: video.Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `video.choose_frames`."""
        return video.choose_frames(clip.frames, minimum, maximum, rng)

    def _laid_out(self, dialogue: chat.Dialogue) -> chat.Dialogue:
        """With `Frame1:` and the first frame to `FrameN:` and the last, a line each, for each video."""
        messages = (tuple(piece for part in one for piece in lines(part)) for one in dialogue.messages)
        return dataclasses.replace(dialogue, messages=tuple(messages))

    def _grids(self, shown: Sequence, training: bool) -> list[Grid]:
        """In training the images of a sample share `image.max_tiles`; in a prompt each may take all."""
        most = self.image.max_tiles // max(len(shown), 1) if training else self.image.max_tiles
        pictures = [one.picture if isinstance(one, Frame) else one for one in shown]
        sizes = [picture if isinstance(picture, tuple) else picture.size for picture in pictures]
        return [
            tile_grid(width, height, self.tile.side, self.image, 1 if isinstance(one, Frame) else most)
            for (width, height), one in zip(sizes, shown, strict=True)
        ]

    def _tiles(self, grid: Grid) -> int:
        return positions.tile_count(*grid, self.image.thumbnail)

    def _place(self, tokens_T: np.ndarray, grids: Sequence[Grid], rope_dhr: bool | None) -> Placed:
        config = self.image
        positions_T, visual_positions_M = positions.sequence_positions(
            tokens_T,
            grids,
            self.tokens_per_side,
            self.context_id,
            config.rope_dhr if rope_dhr is None else rope_dhr,
            config.dhr_map,
            config.thumbnail,
        )
        return Placed(positions_T, np.arange(len(visual_positions_M), dtype=np.int32), visual_positions_M)

    def _cut(self, picture: Image.Image | Frame, grid: Grid, out_ISSc: np.ndarray) -> None:
        write_tiles(picture.picture if isinstance(picture, Frame) else picture, grid, out_ISSc)


def lines(part: chat.Part) -> list[chat.Part]:
    """A part as it is, but the frames of a video as images, a line each."""
    if not isinstance(part, video.Video | video.VideoSize):
        return [part]
    pictures = [part[1:3]] * part.frames if isinstance(part, video.VideoSize) else part.frames
    return [
        piece
        for n, picture in enumerate(pictures, 1)
        for piece in (f"Frame{n}:" if n == 1 else f"\nFrame{n}:", Frame(picture))
    ]
