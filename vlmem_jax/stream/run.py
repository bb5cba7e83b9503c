"""A stream from its source to answers: one thread decodes, one looks, one answers; the caller's waits and saves.

    decode --(4 frames)--> look --(8 snapshots with their questions)--> answer

A question is asked about a snapshot, so looking goes on while its answer is written; and where frames wait behind one
another, an answer gives way to them, see `turns`.
"""

import collections
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmem_jax.geometry.live import Known
from vlmem_jax.models import VLM
from vlmem_jax.stream.asking import Asker
from vlmem_jax.stream.frames import FrameGeometry, Pace, Reading, Source
from vlmem_jax.stream.inbox import ASKED, Ended, Frame, Inbox, Last
from vlmem_jax.stream.notes import Log, Rates
from vlmem_jax.stream.questions import END, Question
from vlmem_jax.stream.turns import Turns
from vlmem_jax.stream.watching import Snapshot
from vlmem_jax.types import Geometry

GEOMETRY, WAITING = "geometry/", "waiting"
"""Names of arrays in a state: what begins so, and the frames whose geometry has not come."""
TICK = 0.1
"""Seconds between two looks of the caller's thread at the clock."""
DENSE = 0.995
"""Mean cosine of a frame to the one before, above which frames are too much alike."""


class Place(NamedTuple):
    """How far a stream has come, to go on from there."""

    time: float = 0.0
    """Of the newest frame looked at, seconds of the stream."""
    ends: float = 0.0
    """When the next one is due."""
    source: str = ""
    start: float = 0.0
    """When this source began."""


class Asked(NamedTuple):
    """A question, and what it is asked about."""

    question: Question
    length: float
    """Seconds of the stream so far."""
    snapshot: Snapshot | None


class Show(NamedTuple):
    """Where answers go, one after the other."""

    begin: Callable[[float, str], None]
    """`begin(seconds of the stream, question)`"""
    piece: Callable[[str], None]
    end: Callable[[str | None], None]
    """`end(what went wrong)`, if something did."""


class Stream:
    """One stream: its parts, and its threads."""

    def __init__(
        self,
        asker: Asker,
        source: Source,
        reading: Reading,
        show: Show,
        questions: Sequence[Question] = (),
        *,
        typing: bool = False,
        max_latency: float | None = None,
        geometry: FrameGeometry | None = None,
        place: Place | None = None,
        log: Log | None = None,
    ):
        """`typing`: whether `inbox` gets more questions, until it hangs up; `max_latency`: seconds that a frame of a
        live source may wait; `place`: that of a stream that goes on, whose watcher was restored.

        Raises ValueError where the memory reads geometry and none comes, or the other way round.
        """
        self.asker, self.watcher, self.source, self.notes = asker, asker.watcher, source, reading.notes
        check_geometry(self.watcher.vlm, geometry is not None)
        self.inbox = Inbox(source.live, questions, self.notes, typing)
        self.looked, self.answered, self.rates = 0, 0, Rates()
        before = place or Place()
        goes_on = place is not None and not source.live and before.source == source.name
        start = before.start if goes_on else before.ends
        self.place = before._replace(source=source.name, start=start)
        self._pace = Pace(reading.fps, before.time - start if goes_on else None)
        self._reading, self._show, self._log, self._geometry = reading, show, log or Log(None, print), geometry
        self._max_latency = max_latency if source.live else None
        self._waiting: collections.deque[Frame] = collections.deque()
        self._ended = self._dense = False
        self._looking = threading.RLock()
        self._turns = Turns(self._crowded)
        self._answers: queue.Queue[Asked] = queue.Queue(ASKED)
        self._all_asked = threading.Event()
        self._failure: BaseException | None = None

    def run(self, stopping: threading.Event, each: Callable[[], None] = lambda: None) -> None:
        """Looks and answers until the stream ends and nothing waits any more, or until it is to be stopped, which
        breaks off an answer. `each` is called some times a second meanwhile.

        Raises what went wrong in a thread, and ValueError where no frame could be looked at.
        """
        works = self._decode, self._look, self._answer
        decoding, *others = (threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works)
        try:
            for thread in (decoding, *others):
                thread.start()
            while others[-1].is_alive() and not stopping.is_set():
                others[-1].join(TICK)
                each()
        finally:
            self._stop()
            for thread in others:
                thread.join()
            decoding.join(TICK)  # one that waits for a camera or a network is left to itself
        if self._failure is not None:
            raise self._failure
        if not self.watcher.frames_B.any() and not stopping.is_set():
            raise ValueError(f"--video {self.source.name} has no frame that could be looked at")

    def save(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays, and what JSON can hold, as they are between two frames."""
        with self._looking:
            arrays, streams = self.watcher.save()
            about = {"streams": streams, "place": self.place._asdict()}
            if self._geometry is not None:
                arrays |= {f"{GEOMETRY}{name}": x for name, x in self._geometry.save().items()}
                arrays[WAITING] = np.array([frame.tile_SSc for frame in self._waiting], np.uint8)
                about["waiting"] = [[frame.time, frame.ends] for frame in self._waiting]
            return arrays, about

    def restore(self, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Goes on from what `save` gave, before it runs. Raises ValueError where it does not fit."""
        mine = {name for name in arrays if name.startswith(GEOMETRY) or name == WAITING}
        self.watcher.restore({name: x for name, x in arrays.items() if name not in mine}, about["streams"])
        if self._geometry is None:
            return
        if WAITING not in mine:
            raise ValueError("the state has no geometry, which this stream goes on with; look again from the beginning")
        self._geometry.restore({name.removeprefix(GEOMETRY): arrays[name] for name in mine - {WAITING}})
        now = time.monotonic()
        for tile_SSc, (seconds, ends) in zip(arrays[WAITING], about["waiting"], strict=True):
            self._waiting.append(Frame(seconds, ends, tile_SSc, now))

    # --- its threads --------------------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = self._failure or error
            self._stop()

    def _stop(self) -> None:
        self._reading.stop.set()
        self.inbox.close()

    @property
    def _stopped(self) -> bool:
        return self._reading.stop.is_set()

    def _decode(self) -> None:
        size, last = None, self.place.ends
        for shown in self.source:
            if self._stopped:
                return
            time_, last = self.place.start + shown.time, self.place.start + shown.ends
            self.inbox.reach(time_)
            if not self._pace.takes(shown.time):
                continue
            try:
                picture = shown.picture()
                tile_SSc = self.asker.processor.frame(picture)
            except ValueError as error:
                self.notes.add("failed", f"{time_:.2f} s: {error}; the frame is left out")
                continue
            if size not in (None, picture.size):
                sizes = ["{}x{}".format(*one) for one in (size, picture.size)]
                self.notes.add("resized", f"{time_:.2f} s: frames were {sizes[0]} pixels large, and are {sizes[1]}")
            size = picture.size
            self.inbox.put(Frame(time_, last, tile_SSc, time.monotonic()))
        self.inbox.end(last)

    def _look(self) -> None:
        try:
            while not isinstance(found := self.inbox.next(), Ended):
                if isinstance(found, Question):
                    self._ask(found)
                elif isinstance(found, Last):
                    with self._looking:
                        self._take_all([] if self._geometry is None else self._geometry.rest())
                    self.place, self._ended = self.place._replace(ends=found.time), True
                elif self._geometry is None:
                    self._take(found, None)
                else:
                    with self._looking:
                        self._waiting.append(found)
                        self.place = self.place._replace(time=found.time, ends=found.ends)
                        self._take_all(self._geometry.push(found.tile_SSc))
        finally:
            self._all_asked.set()

    def _crowded(self) -> bool:
        """Whether a frame is looked at as soon as the one before is done; not where answers must come first."""
        return self.inbox.waiting[0] > 0 and not self._answers.full() and not self._stopped

    def _take_all(self, ready: Sequence[Known]) -> None:
        """Looks at the frames that have waited longest, whose geometry is there."""
        for known in ready:
            frame = self._waiting.popleft()
            if known.says is not None:
                left_out = "; the frame is left out" if known.geometry is None else ""
                self.notes.add("unplaced", f"{frame.time:.2f} s: {known.says}{left_out}")
            if known.geometry is not None:
                self._take(frame, known.geometry)

    def _take(self, frame: Frame, geometry: Geometry | None) -> None:
        began = time.monotonic()
        if self._max_latency is not None and began - frame.came > self._max_latency:
            self.notes.add(
                "late", f"{frame.time:.2f} s: the frame waited for {began - frame.came:.1f} s; it is left out"
            )
            return
        with self._looking, self._turns.frame():
            seen = self.watcher.look([frame.tile_SSc], [frame.time], geometry=None if geometry is None else [geometry])
            if geometry is None:
                self.place = self.place._replace(time=frame.time, ends=frame.ends)
        self.looked += 1
        if not seen.taken_B[0]:
            self.notes.add("refused", f"{frame.time:.2f} s: the frame has features that are not finite; it is not kept")
        similarity = float(seen.similarity_B[0])
        self.rates.add(similarity)
        frames, questions = self.inbox.waiting
        self._log.write(
            frame=int(self.watcher.frames_B[0]) - 1 if seen.taken_B[0] else None,
            time=round(frame.time, 3),
            ms=round(1000 * (time.monotonic() - began), 2),
            similarity=round(similarity, 4) if seen.taken_B[0] and self.watcher.frames_B[0] > 1 else None,
            waiting={"frames": frames, "questions": questions, "answers": self._answers.qsize()},
            counts=dict(self.notes.counts),
        )
        mean = self.rates.similarity
        if mean is not None and mean > DENSE and not self._dense:
            self._dense = True
            self.notes.add(
                "dense", f"video is sampled too densely for the bank: the cosine of a frame to the one before has been "
                f"{mean:.4f} over 100 frames; lower --fps"
            )  # fmt: skip

    def _ask(self, question: Question) -> None:
        """Hands a question on with what is kept now."""
        length = self.place.ends
        if question.at is not None and not self._ended:
            length = max(question.at, length)
        elif question.at is not None and question.at not in (END, length) and question.at > length:
            self.notes.add("early end", f"the stream ended at {length:.2f} s; asked then, not at {question.at:g} s: "
                           f"{question.text[:80]!r}")  # fmt: skip
        asked = Asked(question, length, self.watcher.snapshot())
        if self.source.live and self._answers.full():
            self._unasked(question, f"{ASKED} questions wait already")
            return
        while not self._stopped:
            try:
                self._answers.put(asked, timeout=TICK)
                return
            except queue.Full:
                continue
        self._unasked(question, "the stream was stopped")

    def _unasked(self, question: Question, why: str) -> None:
        self.notes.add("unasked", f"{why}; not asked: {question.text[:80]!r}")

    def _answer(self) -> None:
        while True:
            all_asked = self._all_asked.is_set()
            try:
                asked = self._answers.get(timeout=TICK)
            except queue.Empty:
                if all_asked:
                    return
                continue
            if self._stopped:
                self._unasked(asked.question, "the stream was stopped")
            else:
                self._say(asked)

    def _say(self, asked: Asked) -> None:
        """Answers a question."""
        text, problem, began = "", None, time.monotonic()
        self._show.begin(asked.length, asked.question.text)
        try:
            if asked.snapshot is None:
                raise ValueError("nothing seen yet: a question can be answered once a frame has been looked at")
            for piece in self._turns.pieces(self.asker.answer(asked.question.text, asked.snapshot, asked.length)):
                text += piece
                self._show.piece(piece)
                if self._stopped:
                    problem = "broken off: the stream was stopped"
                    break
        except ValueError as error:
            problem = str(error)
        self._show.end(problem)
        self.answered += 1
        self._log.write(
            question=asked.question.text,
            time=round(asked.length, 3),
            frames=None if asked.snapshot is None else asked.snapshot.frames,
            answer=text,
            error=problem,
            seconds=round(time.monotonic() - began, 3),
        )


def check_geometry(vlm: VLM, comes: bool) -> None:
    """Raises ValueError where the memory reads geometry and none comes, or the other way round."""
    reads = vlm.tile.geometry is not None
    if reads and not comes:
        raise ValueError(
            "the memory of this model reads what is known of the space that each frame shows; name a model that makes "
            "it by --geometry, or train with model.memory.geometry_width=0"
        )
    if comes and not reads:
        raise ValueError("the memory of this model reads no geometry (model.memory.geometry_width is 0); leave it out")
