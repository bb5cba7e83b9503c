"""A memory of a video that is still running: whatever comes in one go gives what the whole video gives."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import UInt8

from vlmem_jax.agent.building import BuildConfig, Builder, Pyramid
from vlmem_jax.agent.calls import Work
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.segments import IngestConfig, Segmenter, Span, frames_at_times
from vlmem_jax.agent.subtitles import SILENT, Track

Keep = Callable[[UInt8[np.ndarray, "H W 3"], float], Frame]
"""`keep(frame, time)`: a frame, in RGB, as it is kept."""


class StreamBuilder:
    """Cuts frames into segments, and builds the memory as they close.

    A frame is kept as soon as it is certain that it is chosen, so that only the last few are held as they came.
    """

    def __init__(self, keep: Keep, ingest: IngestConfig, build: BuildConfig, track: Track = SILENT):
        self._keep, self._fps = keep, ingest.fps
        self._segmenter, self.builder = Segmenter(ingest), Builder(build, track=track)
        self._held: list[tuple[float, np.ndarray | Frame]] = []
        """Frames that may still be chosen, with their times; those that are chosen are kept."""
        self._count = 0

    @property
    def held(self) -> int:
        """Frames that it holds as they came."""
        return sum(not isinstance(frame, Frame) for _, frame in self._held)

    def push(self, frame_HWc: UInt8[np.ndarray, "H W 3"], time: float) -> Work[list[Segment]]:
        """Takes a frame; the segments that are closed by it. Raises ValueError for a time that does not rise."""
        if self._held and time <= self._held[-1][0]:
            raise ValueError(f"times of frames must rise, got {time} after {self._held[-1][0]}")
        self._held.append((time, frame_HWc))
        closed = self._cut(self._segmenter.push(frame_HWc, time))
        self._let_go()
        yield from self.builder.add(closed)
        return closed

    def flush(self, end: float) -> Work[list[Segment]]:
        """The video ends; the segments that are left."""
        closed = self._cut(self._segmenter.flush(end))
        yield from self.builder.add(closed)
        return closed

    def snapshot(self) -> Work[Pyramid]:
        """The memory of all segments that are closed, which says nothing of later ones."""
        return (yield from self.builder.finish())

    def _cut(self, spans: Iterable[Span]) -> list[Segment]:
        found = []
        for span in spans:
            chosen = frames_at_times(span, [time for time, _ in self._held], self._fps)
            found.append(Segment(self._count, *span, frames=tuple(map(self._kept, chosen.tolist()))))
            self._count += 1
            self._held = self._held[max(int(np.searchsorted([time for time, _ in self._held], span.end)) - 1, 0) :]
        return found

    def _let_go(self) -> None:
        """Of the frames before those that a cut may still fall on, all but those that are chosen, and the last."""
        span = self._segmenter.open
        times = [time for time, _ in self._held]
        chosen = frames_at_times(span, times, self._fps).tolist()
        for n in chosen[:-1]:  # in place of the last there may be a later one, where the segment goes on
            self._kept(n)
        before, known = int(np.searchsorted(times, span.end)), set(chosen)
        self._held = [one for n, one in enumerate(self._held) if n >= before - 1 or n in known]

    def _kept(self, n: int) -> Frame:
        """A frame that it holds, which is kept now, if it was not before."""
        time, frame = self._held[n]
        if not isinstance(frame, Frame):
            frame = self._keep(frame, time)
            self._held[n] = time, frame
        return frame
