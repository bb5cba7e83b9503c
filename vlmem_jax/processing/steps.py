"""Samples of models that are told in words when each step of time of a video is, and see it apart: Qwen3-VL."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing import chat, patches
from vlmem_jax.processing.patch_processor import PatchProcessor
from vlmem_jax.processing.patches import PatchConfig, check_aspect
from vlmem_jax.processing.processor import naming
from vlmem_jax.processing.video import Clip, Video, VideoSize
from vlmem_jax.types import PatchGeometry, Sample

log = logging.getLogger(__name__)
TOKEN_PIXELS = 32 * 32
"""What one visual token covers at the published sizes."""


@dataclasses.dataclass(frozen=True)
class StepConfig(PatchConfig):
    """As `PatchConfig`, with the sizes published for Qwen3-VL, and by whose rules a video is sampled and resized."""

    min_pixels: int = 64 * TOKEN_PIXELS
    max_pixels: int = 16384 * TOKEN_PIXELS
    min_frame_pixels: int = 128 * TOKEN_PIXELS
    max_frame_pixels: int = 768 * TOKEN_PIXELS
    total_pixels: int = 115200 * TOKEN_PIXELS
    budget: Literal["frame", "video", "capped"] = "frame"
    """`frame`: each frame by min_frame_pixels, max_frame_pixels and total_pixels, as the authors' scripts do.
    `video`: all together by min_video_pixels and max_video_pixels, as transformers does; `capped`: with no frame of
    more than max_frame_pixels. The two take other frames of long videos, and up to 9 times fewer visual tokens."""
    min_video_pixels: int = 4 * TOKEN_PIXELS
    """Frames x height x width of a video under the other budgets."""
    max_video_pixels: int = 24576 * TOKEN_PIXELS
    video_wrapper: Literal["none", "outer"] = "none"
    """Whether one more <|vision_start|> ... <|vision_end|> stands round all steps of a video, as transformers writes it
    since 5.10; the models were released with code that does not."""

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.min_video_pixels <= self.max_video_pixels:
            raise ValueError(
                "1 <= min_video_pixels <= max_video_pixels must hold, "
                f"got {self.min_video_pixels} and {self.max_video_pixels}"
            )


@dataclasses.dataclass(frozen=True)
class Step(Video):
    """A step of time of a video, and those after it that do not stand in the sequence; to plan with, without frames."""

    grid: PatchGrid = PatchGrid(1, 1, 1)


class StepProcessor(PatchProcessor):
    """A tile is a block of patches and becomes one visual token; a video is written as its steps, each after its time.

    Context and positions as in `PatchProcessor`.
    """

    image: StepConfig

    def choose_frames(
        self, clip: Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """See `choose_frames`: image.fps decides, not the arguments."""
        return choose_frames(clip, self.image, self.geometry)

    def frames_at(self, clip: Clip, fps: float) -> list[int]:
        return choose_frames(clip, dataclasses.replace(self.image, fps=fps), self.geometry)

    def spread(self, clip: Clip, count: int) -> list[int]:
        return choose_frames(clip, self.image, self.geometry, count)

    def open_video(self, path: str | os.PathLike, **how: Any) -> tuple[Video, list[int]]:
        video, chosen = super().open_video(path, **how)
        log.info("%s: frames %s, %s", path, ", ".join(map(str, chosen)), self.told(video))
        return video, chosen

    def told(self, video: Video) -> str:
        grid = video_grid(video.size, self.image, self.geometry)
        height, width = (n * self.geometry.factor for n in (grid.rows, grid.cols))
        rules = f"image.budget={self.image.budget}, image.video_wrapper={self.image.video_wrapper}"
        return f"{super().told(video)}, resized to {width}x{height}: {grid.tokens} visual tokens ({rules})"

    def raw_prompt(
        self,
        text: str,
        images: Sequence = (),
        videos: Sequence[Video] = (),
        *,
        rope_dhr: bool | None = None,
        name: str = "",
    ) -> Sample:
        """As in `Processor`; a video is written out where its placeholder stands between the tokens round it."""
        with naming(name):
            whole = "".join(self.template.video)
            around = text.split(whole)
            if len(around) != 1 + len(videos):
                raise ValueError(f"a raw prompt must hold {whole} for each video, {len(videos)}; got {len(around) - 1}")
            written = [self._steps(video) for video in videos]
            for parts, after in zip(written, around[1:], strict=True):
                around[0] += "".join(part if isinstance(part, str) else whole for part in parts) + after
        steps = [part for parts in written for part in parts if isinstance(part, Step)]
        return super().raw_prompt(around[0], images, steps, rope_dhr=rope_dhr, name=name)

    def _laid_out(self, dialogue: chat.Dialogue) -> chat.Dialogue:
        """With each step of a video apart, behind its time."""
        messages = (tuple(piece for part in one for piece in self._steps(part)) for one in dialogue.messages)
        return dataclasses.replace(dialogue, messages=tuple(messages))

    def _steps(self, part: chat.Part) -> list[chat.Part]:
        if not isinstance(part, Video | VideoSize):
            return [part]
        size, frames = (part.size, part.frames) if isinstance(part, Video) else (part, ())
        grid, depth = video_grid(size, self.image, self.geometry), self.geometry.frames
        times = [*(size.times or (n * size.seconds for n in range(size.frames)))]
        times += times[-1:] * (grid.frames * depth - len(times))
        pieces: list[chat.Part] = []
        for first in range(0, grid.frames, self.context.stride):
            at, count = first * depth, min(self._thinning[0], grid.frames - first)
            step = grid._replace(frames=count, seconds=0.0)
            pieces.append(f"<{(times[at] + times[at + depth - 1]) / 2:.1f} seconds>")
            pieces.append(Step(frames[at : at + count * depth], grid=step))
        if self.image.video_wrapper == "outer":
            start, _, end = map(chat.Control, self.template.video)
            pieces = [start, *pieces, end]
        return pieces

    def _grids(self, shown: Sequence, training: bool) -> list[PatchGrid]:
        images = iter(super()._grids([one for one in shown if not isinstance(one, Step)], training))
        return [one.grid if isinstance(one, Step) else next(images) for one in shown]


def video_grid(size: VideoSize, config: StepConfig, geometry: PatchGeometry) -> PatchGrid:
    """Visual tokens of the frames taken of a video."""
    if config.budget == "frame":
        return patches.video_grid(size, config, geometry)
    most = config.max_video_pixels
    if config.budget == "capped":
        share = most // size.frames
        most = size.frames * max(min(config.max_frame_pixels, share), int(1.05 * config.min_video_pixels))
    sides = volume_resize(size.frames, size.height, size.width, geometry, config.min_video_pixels, most)
    height, width = (side // geometry.factor for side in sides)
    return PatchGrid(-(-size.frames // geometry.frames), height, width, size.seconds * geometry.frames)


def volume_resize(
    frames: int, height: int, width: int, geometry: PatchGeometry, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """(height, width) near those given, in multiples of a visual token's side, so that all `frames` together have
    min_pixels to max_pixels pixels. Raises ValueError for fewer frames than a patch spans, and as `smart_resize`."""
    factor, depth = geometry.factor, geometry.frames
    if frames < depth:
        raise ValueError(f"a video must have at least the {depth} frames of a patch, got {frames}")
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_aspect(height, width)
    rows, cols, volume = round(height / factor), round(width / factor), frames * height * width
    all_pixels = round(frames / depth) * depth * rows * cols * factor**2  # halves to even, as published
    if all_pixels > max_pixels:
        shrink = math.sqrt(volume / max_pixels)
        rows, cols = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif all_pixels < min_pixels:
        enlarge = math.sqrt(min_pixels / volume)
        rows, cols = (math.ceil(side * enlarge / factor) for side in (height, width))
    return rows * factor, cols * factor


def choose_frames(
    clip: Clip,
    config: StepConfig,
    geometry: PatchGeometry,
    count: int | None = None,
    within: tuple[float, float] | None = None,
) -> list[int]:
    """Which frames of a video to take, evenly spaced: `count`, or `fps` of a second, by the rules of the budget.

    `within`: the seconds of the file that they are taken from. Raises ValueError for a video with fewer frames than a
    patch has.
    """
    first, last = 0, clip.frames - 1
    if within is not None:
        first, last = math.ceil(within[0] * clip.fps), min(math.floor(within[1] * clip.fps), last)
    there, depth = last - first + 1, geometry.frames
    if there < depth:
        raise ValueError(f"a video must have at least {depth} frames, of which a patch is made; got {max(there, 0)}")
    wanted = there / clip.fps * config.fps
    if config.budget != "frame":
        count = min(max(int(wanted), config.min_frames), config.max_frames, there) if count is None else count
        return np.linspace(first, last, count).round().astype(int).tolist()
    if count is None:
        most = min(config.max_frames // depth * depth, there)
        count = int(min(max(wanted, -(-config.min_frames // depth) * depth), most)) // depth * depth
    else:
        count = min(max(round(count / depth), 1) * depth, there)
    return _single_linspace(first, last, count).round().astype(int).tolist()


def _single_linspace(first: int, last: int, count: int) -> np.ndarray:
    """Evenly spaced numbers as PyTorch makes them in fp32, from both ends to the middle: for long files, some round to
    other frames than those in fp64."""
    index, step = np.arange(count), np.float32(last - first) / np.float32(max(count - 1, 1))
    up = np.float32(first) + step * index.astype(np.float32)
    down = np.float32(last) - step * (count - 1 - index).astype(np.float32)
    return np.where(index < count // 2, up, down)
