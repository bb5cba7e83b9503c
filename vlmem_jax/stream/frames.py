"""A stream as it comes: frames with their times, and which of them are looked at."""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vlmem_jax.geometry.live import Known
from vlmem_jax.processing.images import ImageConfig
from vlmem_jax.processing.shown import SHOWN, ShownConfig
from vlmem_jax.processing.video import DEFAULT_FPS
from vlmem_jax.stream.notes import Notes

LEAP = 10.0
"""Seconds by which the times of a live stream may run ahead of the clock; more is a jump of its own clock."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A frame that a source shows; nothing is decoded to a picture before it is asked for."""

    time: float
    """Seconds since the first frame."""
    ends: float
    """When the next one is due."""
    picture: Callable[[], Image.Image]
    """Makes it, as 8-bit RGB. Raises ValueError for a damaged frame, and one that is too large."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What sources are told."""

    fps: float = 1.0
    """Frames of a second to look at."""
    max_pixels: int = ImageConfig.max_pixels
    """Of the largest frame that is opened."""
    config: ShownConfig = SHOWN
    notes: Notes = dataclasses.field(default_factory=Notes)
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Ends waiting for a stream that was lost."""
    give_up: float | None = None
    """Seconds after which a stream that was lost stays so; None: never."""

    def __post_init__(self):
        if not self.fps > 0:
            raise ValueError(f"--fps must be above 0, got {self.fps}")


class Source(Protocol):
    """Where frames come from, once."""

    name: str
    live: bool
    """Whether frames come when they come, and are lost if nobody takes them."""

    def __iter__(self) -> Iterator[Shown]:
        """Frames in the order of their times. What cannot be decoded is noted and left out: no frame ends a stream."""


class FrameGeometry(Protocol):
    """What makes geometry of the frames that are looked at, at its own pace: a frame waits until its own is there."""

    digest: str
    """Tells what the geometry depends on, beside the frames."""

    def push(self, tile_SSc: np.ndarray) -> list[Known]:
        """Takes the next frame, as the tower sees it; gives what is known by now, of this one or of earlier ones, each
        once and in order."""

    def rest(self) -> list[Known]:
        """What frames still wait for, where no more come."""

    def save(self) -> dict[str, np.ndarray]:
        """All that what comes later depends on."""

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `save` gave. Raises ValueError where it does not fit."""


class Pace:
    """Which frames are looked at: the first at or after each 1 / fps seconds; of a slower stream, all."""

    def __init__(self, fps: float, after: float | None = None):
        """`after`: when the last frame was looked at, of a stream that goes on."""
        self.fps, self._after, self._wanted = fps, after, 0
        if after is not None:
            self._next(after)

    def takes(self, time: float) -> bool:
        """Asked once for each frame, in the order of their times."""
        if (self._after is not None and time <= self._after) or time * self.fps < self._wanted - 1e-6:
            return False
        self._next(time)
        return True

    def _next(self, time: float) -> None:
        self._wanted = int(time * self.fps + 1e-6) + 1


class Times:
    """The times of decoded frames: seconds since the first, which never go back, whatever the container says."""

    def __init__(self, name: str, rate: float | None, notes: Notes, clock: Callable[[], float] | None = None):
        """`rate`: frames a second, as the header tells; `clock`: seconds that have passed, of a live stream."""
        self.interval = 1 / (rate or DEFAULT_FPS)
        self._name, self._notes, self._clock = name, notes, clock
        self._last: float | None = None
        self._zero: tuple[Fraction, float] | None = None
        self._seen_at = 0.0

    def of(self, frame: Any) -> tuple[float, float]:
        """(time, when the next frame is due) of a frame of PyAV."""
        base = frame.time_base
        raw = None if frame.pts is None or not base else frame.pts * base
        now = self._clock() if self._clock else 0.0
        time = self._time(raw, now)
        duration = float(frame.duration * base) if base and frame.duration else self.interval
        self._last, self._seen_at = time, now
        return time, time + duration

    def lost(self, seconds: float) -> None:
        """Goes on where a stream that comes back after `seconds` is by now."""
        if self._last is not None:
            self._last += seconds
        self._zero = None

    def _time(self, raw: Fraction | None, now: float) -> float:
        after = 0.0 if self._last is None else self._last + self.interval
        if raw is None:
            return after
        if self._zero is None:
            self._zero = raw, after
        time = self._zero[1] + float(raw - self._zero[0])
        if self._last is None:
            return time
        if time < self._last:
            self._notes.add(
                "time", f"{self._name}: time went back by {self._last - time:.2f} s; it goes on from {after:.2f} s"
            )
        elif self._clock and time - self._last > now - self._seen_at + LEAP:
            self._notes.add(
                "time", f"{self._name}: time leapt by {time - self._last:.2f} s; it goes on from {after:.2f} s"
            )
        else:
            return time
        self._zero = raw, after
        return after
