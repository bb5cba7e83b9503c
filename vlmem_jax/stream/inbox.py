"""What waits to be looked at and to be asked, in the order in which it is done."""

import collections
import dataclasses
import heapq
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmem_jax.stream.notes import Notes
from vlmem_jax.stream.questions import Question

FRAMES = 4
"""Frames that wait to be looked at."""
ASKED = 8
"""Questions that wait for an answer, with what each is asked about."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A frame to be looked at."""

    time: float
    """Seconds of the stream."""
    ends: float
    tile_SSc: np.ndarray
    came: float
    """When it came, by `time.monotonic`."""


class Last(NamedTuple):
    """Stands behind the last frame of a stream."""

    time: float
    """When the next frame would be due."""


class Ended:
    """There is nothing more to do."""


class Inbox:
    """Frames and questions of one stream. A frame comes after the questions of earlier times, a question after the
    frames up to its own.

    A source that can wait waits where there is no room; behind a live one the oldest frame gives way to a new one, and
    a new question is refused.
    """

    def __init__(self, live: bool, questions: Sequence[Question], notes: Notes, typing: bool):
        """`typing`: whether questions may come by `ask`, until `hang_up`."""
        self._live, self._notes, self._typing = live, notes, typing
        self._changed = threading.Condition()
        self._frames: collections.deque[Frame | Last] = collections.deque()
        self._now: collections.deque[Question] = collections.deque()
        self._order = itertools.count()
        self._due: list[tuple[float, int, Question]] = []
        self._reached, self._ended, self._closed = -1.0, False, False
        for question in questions:
            self._schedule(question)

    @property
    def ended(self) -> bool:
        """Whether all frames were taken, and questions are all that may still come."""
        with self._changed:
            return self._ended

    @property
    def waiting(self) -> tuple[int, int]:
        """Frames and questions."""
        with self._changed:
            return len(self._frames), len(self._now) + len(self._due)

    def reach(self, time: float) -> None:
        """The stream has come to `time`; frames of that time may follow."""
        with self._changed:
            self._reached = max(self._reached, time)
            self._changed.notify_all()

    def put(self, frame: Frame) -> None:
        """Adds a frame."""
        with self._changed:
            if self._live and len(self._frames) == FRAMES:
                lost = self._frames.popleft()
                self._notes.add("dropped", f"looking is too slow: the frame of {lost.time:.2f} s is dropped")
            self._changed.wait_for(lambda: len(self._frames) < FRAMES or self._closed)
            self._frames.append(frame)
            self._changed.notify_all()

    def ask(self, question: Question) -> None:
        """Adds a question; one without a time is asked before the next frame."""
        with self._changed:
            if question.at is not None:
                self._schedule(question)
            else:
                if self._live and len(self._now) == ASKED:
                    self._notes.add("unasked", f"{ASKED} questions wait already; not asked: {question.text[:80]!r}")
                    return
                self._changed.wait_for(lambda: len(self._now) < ASKED or self._closed)
                self._now.append(question)
            self._changed.notify_all()

    def hang_up(self) -> None:
        """No more questions come."""
        with self._changed:
            self._typing = False
            self._changed.notify_all()

    def end(self, time: float) -> None:
        """No more frames come; the next one would be due at `time`."""
        with self._changed:
            self._frames.append(Last(time))
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody takes anything any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def next(self) -> Frame | Last | Question | Ended:
        """What is to be done next, when there is something."""
        with self._changed:
            while True:
                if self._closed:
                    return Ended()
                if self._now:
                    found = self._now.popleft()
                elif self._due and self._is_due(self._due[0][0]):
                    found = heapq.heappop(self._due)[2]
                elif self._frames:
                    found = self._frames.popleft()
                    self._ended |= isinstance(found, Last)
                elif self._ended and not self._typing:
                    return Ended()
                else:
                    self._changed.wait()
                    continue
                self._changed.notify_all()
                return found

    def _is_due(self, at: float) -> bool:
        if self._frames:
            return self._frames[0].time > at
        return self._ended or self._reached > at

    def _schedule(self, question: Question) -> None:
        heapq.heappush(self._due, (question.at, next(self._order), question))
