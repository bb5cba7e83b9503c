"""Looking and answering share the devices: an answer waits where it would slow looking by more than its share."""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator

SLOWED = 1.4
"""Times as long as alone that frames may take, in the mean, while an answer is written and others wait behind them;
with the time between two of them it is to be at most 1.5."""
PATIENCE = 4
"""Times as long as the longest of its pieces took that an answer waits before the next one, at most: frames may be slow
for another reason."""
KEPT = 50
"""Newest frames by which it is told how long one takes alone."""
TICK = 0.1
"""Seconds after which an answer that waits looks again whether frames still do."""


class Turns:
    """Times frames, and the pieces of one answer at a time, each in its thread."""

    def __init__(self, waiting: Callable[[], bool]):
        """`waiting`: whether frames wait to be looked at."""
        self._waiting = waiting
        self._changed = threading.Condition()
        self._alone: collections.deque[float] = collections.deque(maxlen=KEPT)
        self._looking = self._answering = False
        self._frames, self._seconds = 0, 0.0

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """A context for looking at a frame, which it times."""
        began, self._looking, beside = time.monotonic(), True, self._answering
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            with self._changed:
                self._looking = False
                self._frames, self._seconds = self._frames + 1, self._seconds + seconds
                if not (beside or self._answering):
                    self._alone.append(seconds)
                self._changed.notify_all()

    def pieces(self, answer: Iterable[str]) -> Iterator[str]:
        """The pieces of an answer, each when it is its turn; the first at once."""
        with self._changed:
            self._answering, self._frames, self._seconds = True, 0, 0.0
        answer, took = iter(answer), []
        try:
            while True:
                began = time.monotonic()
                piece = next(answer, None)
                if piece is None:
                    return
                took.append(time.monotonic() - began)
                yield piece
                with self._changed:
                    until = time.monotonic() + PATIENCE * max(took[1:] or took)  # the first reads the prompt
                    while self._slowed() and (self._looking or self._waiting()) and time.monotonic() < until:
                        self._changed.wait(TICK)
        finally:
            self._answering = False

    def _slowed(self) -> bool:
        """Whether the frames since the answer began took more than their time."""
        return bool(self._alone) and self._seconds > SLOWED * self._frames * statistics.median(self._alone)
