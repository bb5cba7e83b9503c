"""A video in pieces: segments between its cuts, and which frames are taken of each.

Times are seconds in float64, and indices come from them by truncation, as in the release of MM-Mem, so that both agree
to the frame.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from vlmem_jax.processing.scenes import THRESHOLD, SceneCuts


@dataclasses.dataclass(frozen=True)
class IngestConfig:
    """How a video is cut into segments, and what is kept of them."""

    threshold: float = THRESHOLD
    """Score of a cut, see `scenes.difference`."""
    quiet: int = 15
    """Frames between two cuts, at least."""
    longest: float = 10.0
    """Seconds of a segment, but for its tail."""
    tail: float = 0.5
    """What is left of a scene and is shorter belongs to the segment before, in seconds."""
    fps: float = 5.0
    """Frames that are taken of a second."""
    side: int = 768
    """Pixels of the longer side of a frame that is kept, at most; 0: there is no limit, as in the release."""
    quality: int = 95
    """Of its JPEG file, 1 to 100."""

    def __post_init__(self):
        for key in ("longest", "fps"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        for key in ("threshold", "quiet", "tail", "side"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key} must be at least 0, got {getattr(self, key)}")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100, got {self.quality}")


class Span(NamedTuple):
    """A stretch of time, without its end."""

    start: float
    end: float


def closes(start: float, known: float, longest: float, tail: float = 0.0) -> bool:
    """Whether a segment from `start` is as long as it gets, in a scene that goes on up to `known` at least."""
    end = start + longest
    return known > end and known - end >= tail


def split(scene: Span, longest: float, tail: float = 0.0) -> list[Span]:
    """A scene in segments, each from where the one before ended."""
    found, start = [], scene.start
    while closes(start, scene.end, longest, tail):
        found.append(Span(start, start + longest))
        start += longest
    return [*found, Span(start, scene.end)]


class Segmenter:
    """Cuts a stream of frames into segments; whatever comes in one go gives what it gives all at once.

    A segment is closed once no cut can fall before its end any more, which may be some frames late, see `SceneCuts`.
    """

    def __init__(self, config: IngestConfig = IngestConfig()):
        self.config = config
        self.cuts = SceneCuts(config.quiet, config.threshold)
        self._start: float | None = None
        self._times: dict[int, float] = {}
        """Of the frames at which a cut may be told."""

    def push(self, frame_HWc: UInt8[np.ndarray, "H W 3"], time: float) -> list[Span]:
        """The segments that end before this frame, as far as that is known. Times must rise."""
        return self._take(time, self.cuts.push(frame_HWc))

    def push_score(self, score: float, time: float) -> list[Span]:
        """As `push`, of a frame whose score is known."""
        return self._take(time, self.cuts.push_score(score))

    def _take(self, time: float, cut: int | None) -> list[Span]:
        config, here = self.config, self.cuts.frames - 1
        self._times = {n: at for n, at in self._times.items() if n == self.cuts.last_above} | {here: time}
        if self._start is None:
            self._start = time
        found = []
        if cut:
            found = split(Span(self._start, self._times[cut]), config.longest, config.tail)
            self._start = self._times[cut]
        certain = self._times[min(self.cuts.horizon, here)]
        while closes(self._start, certain, config.longest, config.tail):
            found.append(Span(self._start, self._start + config.longest))
            self._start = found[-1].end
        return found

    @property
    def open(self) -> Span | None:
        """The segment that is open, as far as it is certain that nothing else begins there."""
        if self._start is None:
            return None
        certain = self._times[min(self.cuts.horizon, self.cuts.frames - 1)]
        return Span(self._start, min(certain, self._start + self.config.longest))

    def flush(self, end: float) -> list[Span]:
        """The segments that are left of a video that ends here."""
        if self._start is None or end <= self._start:
            return []
        found = split(Span(self._start, end), self.config.longest, self.config.tail)
        self._start = end
        return found


# --- frames -----------------------------------------------------------------------------------------------------------


def evenly(count: int, most: int) -> Int[np.ndarray, "n"]:
    """Which of `count` things to take where `most` are wanted, at most: the first, the last, and evenly between."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).astype(int)


def frames_at_rate(span: Span, rate: float, count: int, fps: float) -> Int[np.ndarray, "n"]:
    """Which frames to take `fps` of a second of, in a video of `count` frames, `rate` of them a second throughout."""
    first, last = int(span.start * rate), min(int(span.end * rate), count)
    if first >= last:
        return np.zeros(0, int)
    wanted = max(1, int((span.end - span.start) * fps))
    at = np.linspace(first, last - 1, wanted) if wanted > 1 else np.array([first])
    return np.unique(at.astype(int).clip(0, count - 1))


def frames_at_times(span: Span, times_N: Sequence[float] | Float[np.ndarray, "N"], fps: float) -> Int[np.ndarray, "n"]:
    """The same by the time of each frame, which rises, but not evenly: those that are shown `fps` times a second from
    the start on. One that was there before is taken if none begins so soon that it is not missed. Which they are
    depends on the start, so that they can be chosen while the end is not known."""
    first, last = np.searchsorted(times_N, span)
    if first and (first == last or times_N[first] >= span.start + 1 / fps):  # a slide that stays, say
        first -= 1
    if first >= last:
        return np.zeros(0, int)
    wanted = span.start + np.arange(max(1, math.ceil((span.end - span.start) * fps))) / fps
    shown = np.searchsorted(times_N, wanted[wanted < span.end], side="right") - 1
    return np.unique(shown.clip(first, last - 1))


def changes(frames_NHWc: UInt8[np.ndarray, "N H W c"]) -> Float[np.ndarray, "M"]:
    """How much the colour of a pixel differs from the frame before, for the M = N - 1 frames that have one: in levels
    of 255, of all channels together."""
    return np.abs(np.diff(frames_NHWc.astype(np.int32), axis=0)).sum(-1).mean((1, 2))


def salient(change_M: Float[np.ndarray, "M"], deviations: float = 1.0, apart: int = 1) -> Int[np.ndarray, "n"]:
    """Frames that differ from the one before by more than the mean and so many standard deviations, the largest
    differences first, each at least `apart` frames from those taken (MM-Mem, appendix C); the first frame, if none
    does."""
    wanted = np.flatnonzero(change_M > change_M.mean() + deviations * change_M.std()) + 1 if len(change_M) else []
    kept: list[int] = []
    for frame in sorted(wanted, key=lambda n: (-change_M[n - 1], n)):
        if all(abs(frame - other) >= apart for other in kept):
            kept.append(frame)
    return np.sort(np.array(kept or [0]))


def prototypes(x_ND: Float[np.ndarray, "N D"], count: int, rounds: int = 50) -> Int[np.ndarray, "n"]:
    """The middle of each of `count` clusters, in order: k-means from the farthest items on, beginning with the first;
    ties go to the first."""
    return clusters(np.asarray(x_ND, np.float64), min(count, len(x_ND)), rounds)[1]


def clusters(x_ND: np.ndarray, count: int, rounds: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """The cluster of each item, and the items in the middles."""
    chosen = [0]
    nearest_N = _distances(x_ND, x_ND[:1])[:, 0]
    while len(chosen) < count:
        chosen.append(int(nearest_N.argmax()))
        nearest_N = np.minimum(nearest_N, _distances(x_ND, x_ND[chosen[-1:]])[:, 0])
    middles_KD, labels_N = x_ND[chosen].copy(), np.full(len(x_ND), -1)
    for _ in range(rounds):
        new_N = _distances(x_ND, middles_KD).argmin(1)
        if (new_N == labels_N).all():
            break
        labels_N = new_N
        for k in np.unique(labels_N):
            middles_KD[k] = x_ND[labels_N == k].mean(0)
    distances_NK = _distances(x_ND, middles_KD)
    medoids = [min(np.flatnonzero(labels_N == k), key=lambda n: (distances_NK[n, k], n)) for k in np.unique(labels_N)]
    return labels_N, np.unique(medoids)


def _distances(x_ND: np.ndarray, y_KD: np.ndarray) -> np.ndarray:
    return ((x_ND[:, None] - y_KD[None]) ** 2).sum(-1)
