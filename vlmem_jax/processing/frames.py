"""Samples of models that see a video as frames of one size, and an image as one of them: LLaVA-Video."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from vlmem_jax.processing import chat
from vlmem_jax.processing.context import read_context
from vlmem_jax.processing.images import resized
from vlmem_jax.processing.processor import Placed, Processor
from vlmem_jax.processing.shown import ShownConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Clip, Video, VideoSize
from vlmem_jax.types import FrameGeometry, TileShape

NEWLINE = "\n"


@dataclasses.dataclass(frozen=True)
class FrameConfig(ShownConfig):
    """Which frames a video gives, what is said of them, and what is learned."""

    frames: int = 32
    """Taken of a video, spread evenly over all of it; a shorter one gives all that it has."""
    sampling: Literal["uniform", "second"] = "uniform"
    """`second`: one frame of each second, where these are at most `frames`."""
    time_line: bool = True
    """Whether a line behind a video says how long it is and where its frames stand in it."""
    strict_mask: bool = False
    """Whether answers alone are learned, and the token that ends them; if not, as released, the opening of each answer,
    and every token that opens or ends a turn or a line, too."""
    context: str = "all"
    """Which visual tokens stand in the sequence, whatever a memory reads: all; stride:n: those of every n-th frame;
    kept:n: those of the frames that the memory, which has room for n, keeps at the end, as a stream is answered."""
    max_pixels: int = 89_478_485
    """Of the largest image, or frame of a video, that is opened."""

    moved: ClassVar[dict[str, str]] = {"kind": "the tower of the model tells it"}

    def __post_init__(self):
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        if read_context(self.context).kind not in ("all", "stride", "kept"):
            raise ValueError(f"context must be all, stride:n or kept:n where frames are seen, got {self.context!r}")

    def shows(self, tile: TileShape, whole: bool) -> TileShape:
        """As in `ImageConfig`."""
        return tile._replace(keeps=read_context(self.context).kept)


class FrameProcessor(Processor):
    """A tile is a frame. What does not stand in the sequence has the positions of the frame before that does."""

    size_knobs = "image.frames", "image.frames"
    video_is_whole = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: FrameConfig,
        geometry: FrameGeometry,
        system: str | None = None,
        template: str = "llava-video",
        whole: bool = True,
    ):
        super().__init__(tokenizer, system, template, read_context(image.context), whole)
        self.image, self.geometry = image, geometry
        self.tile = image.shows(TileShape(geometry.size, 3, geometry.tokens), whole)
        self.open_limit = image.max_pixels
        if image.strict_mask:
            self.template = dataclasses.replace(self.template, learned=())

    def choose_frames(
        self, clip: Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """image.frames and image.sampling decide, not the arguments."""
        if self.image.sampling == "second" and clip.frames / clip.fps <= self.image.frames:
            return self.frames_at(clip, 1.0)
        return spread(clip.frames, self.image.frames)

    def frames_at(self, clip: Clip, fps: float) -> list[int]:
        return list(range(0, clip.frames, max(round(clip.fps / fps), 1)))

    def _laid_out(self, dialogue: chat.Dialogue) -> chat.Dialogue:
        """With a line behind each video whose times are known."""
        if not self.image.time_line:
            return dialogue
        messages = (tuple(piece for part in one for piece in self._timed(part)) for one in dialogue.messages)
        return dataclasses.replace(dialogue, messages=tuple(messages))

    def _timed(self, part: chat.Part) -> list[chat.Part]:
        size = part.size if isinstance(part, Video) else part
        if not isinstance(size, VideoSize) or not size.times or 0 < self.context.kept < len(size.times):
            return [part]  # of frames that a memory will choose nobody knows the times
        return [part, NEWLINE + time_line(size.length, size.times[:: self.context.stride])]

    def _grids(self, shown: Sequence, training: bool) -> list[int]:
        """Frames of each of `shown` that are seen."""
        counts = [_frames(one) for one in shown]
        return counts if self.whole else [-(-count // self.context.stride) for count in counts]

    def _tiles(self, grid: int) -> int:
        return grid

    def _placeholders(self, grid: int) -> int:
        return self._standing(grid) * self.geometry.tokens

    def _standing(self, grid: int) -> int:
        """Frames of a grid that stand in the sequence."""
        return min(-(-grid // self._stride), self.context.kept or grid)

    @property
    def _stride(self) -> int:
        """Of what stands in the sequence, among what is seen."""
        return self.context.stride if self.whole else 1

    def _place(self, tokens_T: np.ndarray, grids: Sequence[int], rope_dhr: bool | None) -> Placed:
        if rope_dhr is not None:
            raise ValueError("rope_dhr is for images cut into tiles; leave it out for this model")
        standing_C = np.flatnonzero(tokens_T == self.context_id)
        if len(standing_C) != (wanted := sum(map(self._placeholders, grids))):
            raise ValueError(
                f"{sum(grids)} frames have {wanted} visual tokens in the sequence, but the text holds "
                f"{len(standing_C)} placeholders"
            )
        if 0 < self.context.kept < sum(grids) and len(grids) > 1:
            raise ValueError(
                f"image.context kept:{self.context.kept} takes one video, or no more frames in all; got "
                f"{len(grids)} of {sum(grids)} frames"
            )
        P, first, there, owners, slots = self.geometry.tokens, 0, 0, [np.zeros(0, int)], [np.zeros(0, int)]
        for grid in grids:
            frames, standing = np.arange(grid), self._standing(grid)
            owners.append(there + np.minimum(frames // self._stride, standing - 1)[:, None] * P + np.arange(P))
            slots.append((first + frames[:: self._stride][:standing])[:, None] * P + np.arange(P))
            first, there = first + grid, there + self._placeholders(grid)
        owner_M, slot_C = (np.concatenate([part.reshape(-1) for part in parts]) for parts in (owners, slots))
        positions_T = np.arange(len(tokens_T), dtype=np.int32)
        return Placed(positions_T, slot_C.astype(np.int32), standing_C[owner_M].astype(np.int32))

    def _cut(self, picture: Image.Image | Video, grid: int, out_ISSc: np.ndarray) -> None:
        frames = picture.frames if isinstance(picture, Video) else [picture]
        frames = frames if self.whole else frames[:: self.context.stride]
        for frame, out in zip(frames, out_ISSc, strict=True):
            out[...] = np.asarray(resized(frame, self.geometry.size, self.geometry.size))


def spread(available: int, wanted: int) -> list[int]:
    """`wanted` of the frames of a video, from the first to the last, or all of fewer."""
    return np.linspace(0, available - 1, min(wanted, available)).astype(int).tolist()


def time_line(length: float, times: Sequence[float]) -> str:
    """What LLaVA-Video is told of a video; nothing stands between the two sentences."""
    where = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {length:.2f} seconds, and {len(times)} frames are uniformly sampled from it. These "
        f"frames are located at {where}.Please answer the following questions related to this video."
    )


def _frames(one: Any) -> int:
    size = one if isinstance(one, tuple) else one.size
    return size.frames if isinstance(size, VideoSize) else 1
