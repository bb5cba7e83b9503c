"""Where a video cuts from one scene to another, by how much the colours of a frame differ from the one before.

The content detector of PySceneDetect (its filter `merge` for flashes), whose scores these equal to the last bit:
colours are turned and frames shrunk by the integers of OpenCV. It goes frame by frame, so it also runs on a stream.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

THRESHOLD = 20.0
"""Of the score of a cut, between 0 and 255."""

SMALLEST_WIDTH = 256
"""Wider frames are shrunk to about this width."""

HUE_SHIFT, WEIGHT_BITS = 12, 11
"""Bits behind the point: of OpenCV's divisions, and of its weights between pixels."""


class SceneCuts:
    """Finds cuts in frames that come one by one.

    A cut is told late where cuts follow each other closely: those less than `quiet` frames apart are merged into one,
    at the last of them.
    """

    def __init__(self, quiet: int = 15, threshold: float = THRESHOLD):
        """`quiet`: frames between two cuts, at least."""
        self.quiet, self.threshold = quiet, threshold
        self.frames = 0
        """Frames that were pushed."""
        self.score = 0.0
        """Of the last of them."""
        self._before: np.ndarray | None = None
        self._size: tuple[int, int] | None = None
        """(height, width) at which frames are compared."""
        self.last_above = 0
        """The last frame that differs enough from the one before: what a cut that is told later may be at."""
        self._merge_start = 0
        self._is_merging, self._has_cut = False, False

    def push(self, frame_HWc: UInt8[np.ndarray, "H W 3"]) -> int | None:
        """Takes the next frame, in RGB; the frame that begins a scene, if that is known now.

        One of another size than the first is compared at the size of that.
        """
        self._size = self._size or small_size(*frame_HWc.shape[:2])
        hsv_HWc = to_hsv(resized(frame_HWc, *self._size))
        self.score = 0.0 if self._before is None else difference(hsv_HWc, self._before)
        self._before = hsv_HWc
        return self.push_score(self.score)

    def push_score(self, score: float) -> int | None:
        """As `push`, of a frame with this score."""
        here, self.frames = self.frames, self.frames + 1
        is_above, is_quiet = score >= self.threshold, here - self.last_above >= self.quiet
        if is_above:
            self.last_above = here
        if self._is_merging:
            if is_quiet and not is_above and self.last_above - self._merge_start >= self.quiet:
                self._is_merging = False
                return self.last_above
        elif is_above and is_quiet:
            self._has_cut = True
            return here
        elif is_above and self._has_cut:
            self._is_merging, self._merge_start = True, here
        return None

    @property
    def horizon(self) -> int:
        """No cut that is still to be told falls before this frame."""
        if self._is_merging and self.last_above - self._merge_start >= self.quiet:
            return self.last_above
        return self.frames


def difference(one_HWc: UInt8[np.ndarray, "H W 3"], other_HWc: UInt8[np.ndarray, "H W 3"]) -> float:
    """The mean difference of two frames in hue, saturation and value; hues are not taken round their circle."""
    apart_HWc = np.maximum(one_HWc, other_HWc) - np.minimum(one_HWc, other_HWc)
    each_c = np.moveaxis(apart_HWc, -1, 0).sum((1, 2), dtype=np.int64) / (one_HWc.shape[0] * one_HWc.shape[1])
    return float(sum(each_c) / len(each_c))


class _Weights(NamedTuple):
    """Where each pixel of a resized axis lies between two of the whole one."""

    low_N: Int32[np.ndarray, "N"]
    high_N: Int32[np.ndarray, "N"]
    weight_N2: Int32[np.ndarray, "N 2"]


@functools.lru_cache(maxsize=32)
def _weights(size: int, new: int) -> _Weights:
    """Of bilinear interpolation, in float32 as OpenCV reckons them, then rounded."""
    place_N = ((np.arange(new) + 0.5) * (size / new) - 0.5).astype(np.float32)
    low_N = np.floor(place_N).astype(np.int32)
    part_N = place_N - low_N
    part_N[low_N < 0] = 0
    part_N[low_N >= size - 1] = 0
    low_N = np.clip(low_N, 0, size - 1)
    weight_N2 = np.stack([1 - part_N, part_N], -1) * np.float32(1 << WEIGHT_BITS)
    return _Weights(low_N, np.minimum(low_N + 1, size - 1), np.rint(weight_N2).astype(np.int32))


class _Corners(NamedTuple):
    """Where the four pixels are in a flat frame, channel by channel, between which each of a resized one lies."""

    upper_2cN: Int64[np.ndarray, "2 c h w"]
    lower_2cN: Int64[np.ndarray, "2 c h w"]


@functools.lru_cache(maxsize=8)
def _corners(size: tuple[int, int], new: tuple[int, int]) -> _Corners:
    rows, columns = (_weights(*axis) for axis in zip(size, new, strict=True))
    across_2W = np.stack([columns.low_N, columns.high_N]).astype(np.int64)
    upper, lower = (
        (row_N[None, None, :, None] * size[1] + across_2W[:, None, None]) * 3 + np.arange(3)[:, None, None]
        for row_N in (rows.low_N.astype(np.int64), rows.high_N)
    )
    return _Corners(upper, lower)


def small_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a frame of the smallest width, or as it is, if it is narrower."""
    by = max(width / SMALLEST_WIDTH, 1)
    return max(1, round(height / by)), max(1, round(width / by))


def resized(frame_HWc: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """A frame between whose pixels those of a smaller or larger one are interpolated, by OpenCV's integers."""
    if frame_HWc.shape[:2] == (height, width):
        return frame_HWc
    rows, columns = _weights(frame_HWc.shape[0], height), _weights(frame_HWc.shape[1], width)
    flat, parts = frame_HWc.reshape(-1), []  # channel by channel, as all that follows reads them
    for n, at_2cN in enumerate(_corners(frame_HWc.shape[:2], (height, width))):
        left, right = flat.take(at_2cN).astype(np.int32)
        across_cHW = left * columns.weight_N2[:, 0] + right * columns.weight_N2[:, 1]
        parts.append((rows.weight_N2[:, n, None] * (across_cHW >> 4)) >> 16)
    return np.moveaxis((parts[0] + parts[1] + 2) >> 2, 0, -1).astype(np.uint8)


@functools.lru_cache(maxsize=1)
def _reciprocals() -> tuple[Int32[np.ndarray, "256"], Int32[np.ndarray, "256"]]:
    """255 / n and 180 / (6 n) for n of 0 to 255."""
    n = np.arange(1, 256, dtype=np.float64)
    divided = (np.rint((top << HUE_SHIFT) / n).astype(np.int32) for top in (255, 30))
    first, second = (np.concatenate([[0], of]).astype(np.int32) for of in divided)
    return first, second


def to_hsv(frame_HWc: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """RGB as hue (0 to 179), saturation and value (0 to 255), by OpenCV's integers."""
    saturations, hues = _reciprocals()
    r, g, b = np.moveaxis(frame_HWc.astype(np.int32), -1, 0)
    value = np.maximum(np.maximum(r, g), b)
    span = value - np.minimum(np.minimum(r, g), b)
    half = 1 << (HUE_SHIFT - 1)
    saturation = (span * saturations.take(value) + half) >> HUE_SHIFT
    hue = np.where(value == r, g - b, np.where(value == g, b - r + 2 * span, r - g + 4 * span))
    hue = (hue * hues.take(span) + half) >> HUE_SHIFT
    hue += np.where(hue < 0, 180, 0)
    return np.moveaxis(np.stack([hue, saturation, value]).astype(np.uint8), 0, -1)
