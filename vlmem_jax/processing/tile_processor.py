"""Samples of models that see an image as square tiles and a thumbnail, and a video as images: InternVL, CoMemo."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.processing import chat, video
from vlmem_jax.processing.images import ImageConfig, tile_grid, write_tiles
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.types import TileShape

Grid = tuple[int, int]
"""Columns and rows of tiles."""


class Shown(NamedTuple):
    """An image, or a frame of a video."""

    picture: Any
    """The image or its (width, height), pixels."""
    is_frame: bool


class TileProcessor(Processor):
    """Sees a tile as `tokens_per_side`**2 visual tokens. A frame of a video is one tile."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageConfig,
        tokens_per_side: int,
        system: str | None = None,
        template: str = "internlm2-chat",
    ):
        super().__init__(tokenizer, system, template)
        self.image = image
        self.tokens_per_side = tokens_per_side
        self.tile = TileShape(image.size, 3, tokens_per_side**2)
        self.open_limit = image.max_pixels

    def choose_frames(
        self, clip: video.Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `video.choose_frames`."""
        return video.choose_frames(clip.frames, minimum, maximum, rng)

    def _shown(self, dialogue: chat.Dialogue, images: Sequence, videos: Sequence) -> tuple[chat.Dialogue, list[Shown]]:
        frames = [[item[1:3]] * item.frames if isinstance(item, video.VideoSize) else item.frames for item in videos]
        next_image, next_frames = iter(images), iter(frames)
        shown: list[Shown] = []
        for marker in dialogue.markers:
            is_video = marker == chat.VIDEO_MARKER
            shown += [Shown(picture, is_video) for picture in (next(next_frames) if is_video else [next(next_image)])]
        return chat.with_frames(dialogue, [len(one) for one in frames]), shown

    def _grids(self, shown: Sequence[Shown], training: bool) -> list[Grid]:
        """In training the images of a sample share `image.max_tiles`; in a prompt each may take all."""
        most = self.image.max_tiles // max(len(shown), 1) if training else self.image.max_tiles
        sizes = [picture if isinstance(picture, tuple) else picture.size for picture, _ in shown]
        return [
            tile_grid(width, height, self.image, 1 if is_frame else most)
            for (width, height), (_, is_frame) in zip(sizes, shown, strict=True)
        ]

    def _tiles(self, grid: Grid) -> int:
        return positions.tile_count(*grid, self.image.thumbnail)

    def _place(self, tokens_T: np.ndarray, grids: Sequence[Grid], rope_dhr: bool | None) -> Placed:
        config = self.image
        positions_T, memory_positions_M = positions.sequence_positions(
            tokens_T,
            grids,
            self.tokens_per_side,
            self.context_id,
            config.rope_dhr if rope_dhr is None else rope_dhr,
            config.dhr_map,
            config.thumbnail,
        )
        return Placed(positions_T, np.arange(len(memory_positions_M), dtype=np.int32), memory_positions_M)

    def _cut(self, picture: Shown, grid: Grid, out_ISSc: np.ndarray) -> None:
        image: Image.Image = picture.picture
        write_tiles(image, grid, out_ISSc)
