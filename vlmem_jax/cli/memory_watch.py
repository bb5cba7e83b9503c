"""Builds the memory of a video as it comes, and answers questions about what it holds by then.

A video is a file, a folder of pictures, a camera (/dev/video0), a pipe, or an address (rtsp, http, tcp or udp). Each
line of the standard input is a question, asked at once, or {"at": 120, "question": "..."}. Ctrl-C and SIGTERM end a
live stream, whose memory is then complete; of a file, the same command goes on.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from vlmem_jax.agent.calls import run as answered
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.memory import Helpers, Memory, engine_for, finder
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.recording import Recorder, content_digest, made_of, remember
from vlmem_jax.agent.store import video_id
from vlmem_jax.agent.writing import Writer, write_store
from vlmem_jax.cli.memory_ask import embedder
from vlmem_jax.cli.memory_build import about, add_model, load, settings
from vlmem_jax.cli.memory_show import answer_lines, clock, told
from vlmem_jax.stream import Notes, Question, Reading, Shown, Source, kind_of, open_source
from vlmem_jax.stream import questions as typed
from vlmem_jax.stream.live import without_password
from vlmem_jax.train.loop import interruption

EXAMPLE = """vlmem memory watch --video rtsp://camera.local/1 --store runs/memories --checkpoint RUN
  vlmem memory watch --video a.mp4 --store runs/memories --checkpoint RUN < questions.jsonl"""
AHEAD = 64
"""Frames that are decoded ahead; of a live stream, while the model is asked, the oldest give way."""
TICK = 0.2
"""Seconds between two looks for questions."""
STOPPING = "stopping when this call is answered; once more: at once"
ENDING = "ending"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem memory watch`."""
    parser.add_argument("--video", required=True, metavar="WHAT", help="a file, folder, device, pipe or address")
    parser.add_argument("--fps", type=float, default=1.0, help="pictures a second of a folder (%(default)s)")
    parser.add_argument(
        "--give-up", type=float, metavar="SECONDS", help="end when a live stream was lost for so long (default: never)"
    )
    parser.add_argument("--trace", action="store_true", help="show what each stage found")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """0 when done, and when a live stream was stopped; 130 when a file was."""
    config, image = settings(args)
    library, helpers = Library(args.store), Helpers.of(embedder(args))
    is_live = kind_of(args.video) not in ("file", "folder")
    now = hashlib.blake2b(f"{args.video} {time.time()}".encode(), digest_size=16).hexdigest()
    mark = now if is_live else content_digest(args.video)
    name = without_password(args.video) if is_live else Path(args.video).resolve().name
    video = library.find(mark) or video_id(name, mark)
    if not is_live:
        open_source(args.video, Reading(args.fps))  # what cannot be opened is found before the model is loaded
    model = load(args, image)
    made = made_of(video, mark, about(args, model, image), helpers.embedder, config)
    with interruption(STOPPING, ENDING) as stopping, write_store(library.folder(video), made) as store:
        if store.state == "closed":
            raise ValueError(f"the memory of {video} is complete; ask it by `vlmem memory ask`")
        notes = Notes(_say)
        limits = {"max_pixels": model.processor.open_limit, "config": model.processor.image, "notes": notes}
        source = open_source(args.video, Reading(args.fps, stop=stopping, give_up=args.give_up, **limits))
        recorder = Recorder(store, config, helpers.embedder)
        answers = EngineModel(engine_for(model, config), model.processor, finder([store.frames]), config.show)
        memory = Memory(store, config, helpers, lambda: answers)
        asking = _Asking(recorder, memory, answers, args.trace)
        _say(f"{video}: type a question and press Enter; Ctrl-C ends")
        began = time.monotonic()
        try:
            answered(remember(_Ahead(source, notes, asking.ask, stopping), recorder, store, notes), answers)
        except _Stopped:
            _say("stopped; the same command goes on")
            return 130
        _say(_ended(video, store, recorder.time / max(time.monotonic() - began, 1e-9)))
        memory.pyramid = store.pyramid()
        asking.rest(stopping)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _ended(video: str, store: Writer, speed: float) -> str:
    counts = store.counts()
    return f"{video}: {counts['segment']} segments, {counts['episode']} episodes; {speed:.2f} x real time"


class _Stopped(Exception):
    """A file is not watched to its end."""


class _Ahead:
    """A source that a thread decodes, so that the frames of a camera are taken while the model is asked."""

    def __init__(self, source: Source, notes: Notes, each: Callable[[], None], stopping: threading.Event):
        """`each`: what is done between frames."""
        self.name, self.live = source.name, source.live
        self._source, self._notes, self._each, self._stopping = source, notes, each, stopping
        self._frames: queue.Queue[Shown | BaseException | None] = queue.Queue(AHEAD)

    def __iter__(self) -> Iterator[Shown]:
        threading.Thread(target=self._decode, daemon=True).start()
        while True:
            self._each()
            if self._stopping.is_set():
                if self.live:
                    return
                raise _Stopped
            try:
                shown = self._frames.get(timeout=TICK)
            except queue.Empty:
                continue
            if shown is None:
                return
            if isinstance(shown, BaseException):
                raise shown
            yield shown

    def _decode(self) -> None:
        end: BaseException | None = None
        try:
            for shown in self._source:
                self._put(_decoded(shown))
                if self._stopping.is_set():
                    return
        except Exception as error:
            end = error
        self._put(end)

    def _put(self, shown: Shown | BaseException | None) -> None:
        while not self._stopping.is_set():
            try:
                self._frames.put(shown, timeout=0 if self.live else TICK)
                return
            except queue.Full:
                if self.live:
                    self._drop()

    def _drop(self) -> None:
        try:
            lost = self._frames.get_nowait()
        except queue.Empty:
            return
        self._notes.add(
            "dropped", f"{self.name}: the frame at {lost.time:.2f} s came while others waited; it is left out"
        )


def _decoded(shown: Shown) -> Shown:
    """The same, whose picture is there: it is made in the thread that decodes, and outlives the file."""
    try:
        picture = shown.picture()
    except ValueError as error:
        return dataclasses.replace(shown, picture=functools.partial(_raise, error))
    return dataclasses.replace(shown, picture=lambda: picture)


def _raise(error: ValueError) -> NoReturn:
    raise error


class _Asking:
    """Questions as they are typed, answered from what is closed by then."""

    def __init__(self, recorder: Recorder, memory: Memory, model: EngineModel, trace: bool):
        self._recorder, self._memory, self._model, self._trace = recorder, memory, model, trace
        self._waiting: collections.deque[Question] = collections.deque()
        self._hung_up = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def ask(self) -> None:
        """Answers what is due."""
        now = self._recorder.time
        due = [one for one in list(self._waiting) if one.at is None or one.at <= now]
        if due and not self._recorder.pyramid.segments:
            due = [one for one in due if one.at is not None]  # asked at once, before there is anything: it waits
        for one in due:
            self._waiting.remove(one)
            self._memory.pyramid = answered(self._recorder.snapshot(), self._model)
            self._answer(one)

    def rest(self, stopping: threading.Event) -> None:
        """Answers what else is asked, when the video has ended, until nobody types any more."""
        while not stopping.is_set():
            while self._waiting:
                self._answer(self._waiting.popleft())
            if self._hung_up.wait(TICK) and not self._waiting:
                return

    def _answer(self, one: Question) -> None:
        until = typed.END if one.at is None else one.at
        print(f"[{clock(min(self._recorder.time, until))}] {told(one.text, 200)}")
        try:
            print("\n".join(answer_lines(self._memory.ask(one.text, until=until), self._trace)), flush=True)
        except ValueError as error:
            _say(f"error: {error}")

    def _listen(self) -> None:
        try:
            for line in sys.stdin:
                try:
                    if question := typed.of_line(line):
                        self._waiting.append(question)
                except ValueError as error:
                    _say(f"error: {error}")
        finally:
            self._hung_up.set()
