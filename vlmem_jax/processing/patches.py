"""Images and frames of any size to blocks of patches, as Qwen2.5-VL sees them (arXiv 2502.13923, sec. 2.1)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing.context import read_context
from vlmem_jax.processing.images import resized
from vlmem_jax.processing.shown import ShownConfig
from vlmem_jax.processing.video import Clip, VideoSize
from vlmem_jax.types import PatchGeometry, TileShape

MAX_ASPECT = 200
"""Longest side of an image, as a multiple of its shortest."""
TOKEN_PIXELS = 28 * 28
"""What one visual token covers at the published sizes."""


@dataclasses.dataclass(frozen=True)
class PatchConfig(ShownConfig):
    """How images and videos are resized before they are cut into patches, and which frames a video gives."""

    min_pixels: int = 4 * TOKEN_PIXELS
    """Smaller images are enlarged to it."""
    max_pixels: int = 16384 * TOKEN_PIXELS
    """Larger images are shrunk to it. The fewer, the cheaper and the less is seen."""
    min_frame_pixels: int = 128 * TOKEN_PIXELS
    """The same for the frames of a video."""
    max_frame_pixels: int = 768 * TOKEN_PIXELS
    total_pixels: int = 115200 * TOKEN_PIXELS
    """Of a video's frames, those that share a patch counted once: many frames are shrunk further, though never below
    1.05 min_frame_pixels."""
    fps: float = 2.0
    """Frames taken of a second of video."""
    min_frames: int = 4
    max_frames: int = 768
    context: str = "all"
    """Which visual tokens stand in the sequence, whatever a memory reads: all; pooled:k: means of k x k neighbours;
    stride:n: every n-th step of time of a video."""

    moved: ClassVar[dict[str, str]] = {"kind": "the tower of the model tells it"}

    def __post_init__(self):
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("min_frame_pixels", "max_frame_pixels"),
            ("min_frames", "max_frames"),
        ):
            if not 1 <= getattr(self, low) <= getattr(self, high):
                raise ValueError(f"1 <= {low} <= {high} must hold, got {getattr(self, low)} and {getattr(self, high)}")
        if read_context(self.context).kind == "thumbnail":
            raise ValueError("context must be all, pooled:k or stride:n where images are not cut into tiles")
        if not self.fps > 0:
            raise ValueError(f"fps must be a positive number of frames a second, got {self.fps}")

    def shows(self, tile: TileShape, whole: bool) -> TileShape:
        """As in `ImageConfig`."""
        return tile._replace(pooled=read_context(self.context).pooled > 1)


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int | float) -> tuple[int, int]:
    """(height, width) near those given, in multiples of `factor`, of min_pixels to max_pixels pixels.

    Raises ValueError for an image that is more than MAX_ASPECT times as long as it is wide.
    """
    check_aspect(height, width)
    rows, cols = round(height / factor), round(width / factor)  # halves go to the even neighbour, as published
    if rows * cols * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, cols = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * cols * factor**2 < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        rows, cols = (math.ceil(side * enlarge / factor) for side in (height, width))
    return rows * factor, cols * factor


def check_aspect(height: int, width: int) -> None:
    """Raises ValueError for an image that is more than MAX_ASPECT times as long as it is wide."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"an image may be at most {MAX_ASPECT} times as long as wide, got {width}x{height} pixels")


def image_grid(width: int, height: int, config: PatchConfig, geometry: PatchGeometry) -> PatchGrid:
    """Visual tokens of an image of this size in pixels."""
    factor = geometry.factor
    height, width = smart_resize(height, width, factor, config.min_pixels, config.max_pixels)
    return PatchGrid(1, height // factor, width // factor)


def video_grid(size: VideoSize, config: PatchConfig, geometry: PatchGeometry) -> PatchGrid:
    """Visual tokens of the frames taken of a video."""
    factor, least = geometry.factor, int(1.05 * config.min_frame_pixels)
    share = config.total_pixels / size.frames * geometry.frames
    most = max(min(config.max_frame_pixels, share), least)
    height, width = smart_resize(size.height, size.width, factor, config.min_frame_pixels, most)
    steps = -(-size.frames // geometry.frames)
    return PatchGrid(steps, height // factor, width // factor, size.seconds * geometry.frames)


def choose_frames(clip: Clip, config: PatchConfig, geometry: PatchGeometry) -> list[int]:
    """Which frames of a video to take: `fps` of a second, evenly spaced over all of it, a multiple of those of a patch.

    Raises ValueError for a video with fewer frames than a patch has.
    """
    least = -(-config.min_frames // geometry.frames) * geometry.frames
    wanted = min(max(clip.frames / clip.fps * config.fps, least), config.max_frames, clip.frames)
    count = int(wanted) // geometry.frames * geometry.frames
    if not count:
        raise ValueError(
            f"a video must have at least {geometry.frames} frames, of which at most image.max_frames "
            f"{config.max_frames} are taken; got {clip.frames}"
        )
    return np.linspace(0, clip.frames - 1, count).round().astype(int).tolist()


def write_blocks(
    frames: Sequence[Image.Image],
    grid: PatchGrid,
    order_N: Int[np.ndarray, "N"],
    geometry: PatchGeometry,
    out_ISSc: UInt8[np.ndarray, "I S S c"],
) -> None:
    """Resizes and cuts the frames of a video, or an image as its only frame, into blocks of patches.

    A frame's blocks come in the order `order_N`. Too few frames for the last patch repeat the last one.
    """
    p, merge, depth = geometry.size, geometry.merge, geometry.frames
    width, height = grid.cols * geometry.factor, grid.rows * geometry.factor
    out = out_ISSc.reshape(grid.frames, grid.rows * grid.cols, *out_ISSc.shape[1:])
    for step, part in enumerate(out):
        chosen = frames[step * depth : (step + 1) * depth]
        pixels = [np.asarray(resized(frame, width, height)) for frame in chosen]
        pixels += [pixels[-1]] * (depth - len(pixels))
        x = np.stack(pixels).reshape(depth, grid.rows, merge, p, grid.cols, merge, p, 3)
        x = x.transpose(1, 4, 2, 5, 7, 0, 3, 6)  # row, column; row and column in the block; colour, frame, y, x
        part[...] = x.reshape(part.shape)[order_N]
