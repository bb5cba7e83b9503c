"""Looks at a video as it comes, and answers questions about what it remembers of it, at any time.

A video is a file, a folder of pictures, a camera (/dev/video0), a pipe, or an address (rtsp, http, tcp or udp). Without
--ask and --questions, each line of the standard input is a question, asked at once, or {"at": 120, "question": "..."}.
Ctrl-C and SIGTERM save and end; with --load, a file or folder goes on where it was left.
"""

import argparse
import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from vlmem_jax.cli import answering
from vlmem_jax.evals.digest import digest
from vlmem_jax.generate import LoadedModel
from vlmem_jax.geometry.live import LiveGeometry
from vlmem_jax.paths import as_path
from vlmem_jax.stream import (
    Asker,
    Log,
    Notes,
    Place,
    Reading,
    Show,
    Stream,
    Watcher,
    check_geometry,
    kind_of,
    open_source,
    state,
)
from vlmem_jax.stream import questions as asked
from vlmem_jax.train.lock import locked
from vlmem_jax.train.loop import interruption

EXAMPLE = """vlmem stream --checkpoint RUN --video a.mp4 --ask "What is on the desk?" --at 60 --ask "Where is the door?"
  vlmem stream --checkpoint RUN --video rtsp://camera.local/1 --fps 2 --save hall.state --save-every 600
  vlmem stream --checkpoint RUN --video /dev/video0 --load hall.state --save hall.state --log steps.jsonl
  vlmem stream --checkpoint RUN --video my/pictures --questions q.jsonl"""
STOPPING = "stopping when this frame is looked at; once more: at once, without saving"
ENDING = "ending"


class _Ask(argparse.Action):
    """Keeps each --ask with the --at behind it."""

    def __call__(self, parser: argparse.ArgumentParser, args: argparse.Namespace, value: Any, flag: str | None = None):
        if flag == "--ask":
            args.asked = [*args.asked, (value, None)]
        elif not args.asked or args.asked[-1][1] is not None:
            parser.error("--at stands behind the --ask that it is for, once")
        else:
            args.asked = [*args.asked[:-1], (args.asked[-1][0], value)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    answering.add_arguments(parser, streams=False)
    parser.add_argument("--video", required=True, metavar="WHAT", help="a file, folder, device, pipe or address")
    parser.add_argument("--fps", type=float, default=1.0, help="frames of a second that are looked at (%(default)s)")
    parser.add_argument(
        "--ask",
        dest="asked",
        action=_Ask,
        default=[],
        metavar="QUESTION",
        help="a question, asked at the end, or at the --at behind it; may be repeated",
    )
    parser.add_argument(
        "--at",
        dest="asked",
        action=_Ask,
        type=float,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help="when the question before it is asked, seconds of the stream",
    )
    parser.add_argument("--questions", metavar="FILE", help='JSONL file of {"at": SECONDS, "question": "..."}')
    parser.add_argument("--load", metavar="FILE", help="go on from a state that --save wrote")
    parser.add_argument("--save", metavar="FILE", help="keep the memory in a file, at the end and when stopped")
    parser.add_argument("--save-every", type=float, metavar="SECONDS", help="and every so often meanwhile")
    parser.add_argument("--log", metavar="FILE", help="JSONL file that gets a line a frame, an answer and an event")
    parser.add_argument(
        "--max-latency",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="a frame of a live stream that has waited longer is left out (%(default)s)",
    )
    parser.add_argument(
        "--give-up", type=float, metavar="SECONDS", help="end when a live stream was lost for so long (default: never)"
    )


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: then the state is saved, if it is to be."""
    sampling = answering.sampling(args)
    questions = asked.of_flags(args.asked) + (asked.of_file(args.questions) if args.questions else [])
    terminal = _Terminal(not questions and sys.stdin.isatty())
    if args.save_every is not None and not (args.save and args.save_every > 0):
        raise ValueError(f"--save-every must be above 0, and needs --save FILE; got {args.save_every:g}")
    if not args.max_latency > 0:
        raise ValueError(f"--max-latency must be above 0, got {args.max_latency:g}")
    # a wrong name, and a wrong state, are found before the model is loaded
    live = kind_of(args.video) not in ("file", "folder")
    loaded = state.read_state(args.load) if args.load else None
    with contextlib.ExitStack() as stack:
        if args.save:
            file = as_path(args.save)
            stack.enter_context(locked(file.parent, terminal.say, f".{file.name}.lock", "--save"))
        log = stack.enter_context(contextlib.closing(Log(args.log, terminal.say)))
        model = answering.load(args)
        geometry = _geometry(model)
        check_geometry(model.vlm, geometry is not None)
        watcher = Watcher(model)
        asker = Asker(watcher, sampling, answering.rope_dhr(args))
        mine = state.made_by(model.vlm, args.checkpoint, digest(model.params)) if args.save or args.load else {}
        mine |= {"geometry": geometry.digest} if mine and geometry else {}
        place = None
        if loaded is not None:
            state.check_made_by(args.load, loaded[1]["made_by"], mine)
            place = Place(**loaded[1]["place"])
        if live:
            asker.warm()
        notes, image = Notes(terminal.say, log), model.processor.image
        reading = Reading(args.fps, model.processor.open_limit, image, notes, give_up=args.give_up)
        source = open_source(args.video, reading)
        if source.live and any(question.at == asked.END for question in questions):
            raise ValueError(f"--video {source.name} has no end, so that a question needs a time: --at SECONDS")
        options = {"typing": not questions, "max_latency": args.max_latency, "place": place, "log": log}
        stream = Stream(asker, source, reading, terminal.show, questions, geometry=geometry, **options)
        if loaded is not None:
            stream.restore(*loaded)
        if not questions:
            terminal.greet()
            threading.Thread(target=_read_questions, args=(stream,), daemon=True).start()
        saving = _Saving(stream, args.save, args.save_every, mine)
        stopping = stack.enter_context(interruption(STOPPING, ENDING))
        try:
            stream.run(stopping, lambda: (saving.if_due(), terminal.progress(stream)))
        except Exception:
            saving.save()
            raise
        saving.save()
    counts = "".join(f", {count} {kind}" for kind, count in sorted(notes.counts.items()))
    terminal.say(f"{source.name}: looked at {stream.looked} frames, answered {stream.answered} questions{counts}")
    return 0


def _geometry(model: LoadedModel) -> LiveGeometry | None:
    """What makes the geometry of frames, if --geometry names a model; that of what is shown at once is not asked."""
    seer, model.processor.geometry_of = model.processor.geometry_of, None
    return None if seer is None else LiveGeometry(seer, model.processor.tile.side)


def _read_questions(stream: Stream) -> None:
    """Asks each line of the standard input."""
    try:
        for line in sys.stdin:
            try:
                if question := asked.of_line(line):
                    stream.inbox.ask(question)
            except ValueError as error:
                stream.notes.add("bad line", f"error: {error}")
    finally:
        stream.inbox.hang_up()


class _Saving:
    """The file that a stream is kept in, if there is to be one."""

    def __init__(self, stream: Stream, file: str | None, every: float | None, made_by: Mapping[str, Any]):
        self._stream, self._file, self._every, self._made_by = stream, file, every, made_by
        self._saved = time.monotonic()

    def if_due(self) -> None:
        """Saves every so often; looking goes on where that fails, and what was saved before stays."""
        if self._every is not None and time.monotonic() - self._saved >= self._every:
            try:
                self.save()
            except OSError as error:
                self._stream.notes.add("unsaved", f"{self._file} could not be saved: {error.strerror}; looking goes on")
            self._saved = time.monotonic()

    def save(self) -> None:
        """Raises OSError naming the file."""
        if self._file is None:
            return
        arrays, about = self._stream.save()
        try:
            state.write_state(self._file, arrays, {"made_by": self._made_by, **about})
        except OSError as error:
            raise OSError(error.errno, error.strerror, self._file) from error


class _Terminal:
    """Answers on the standard output, what else there is to say on the other, and there a line of progress, unless
    questions are typed."""

    def __init__(self, typing: bool):
        self._lock = threading.Lock()
        self._typing, self._shows = typing, sys.stderr.isatty() and not typing
        self._width, self._answering, self._next = 0, False, 0.0
        self.show = Show(self._begin, self._piece, self._end)

    def say(self, text: str) -> None:
        with self._lock:
            self._clear()
            print(text, file=sys.stderr, flush=True)

    def greet(self) -> None:
        """Says how questions are typed, where they are."""
        if self._typing:
            self.say("type a question and press Enter; Ctrl-D: no more questions; Ctrl-C ends")

    def progress(self, stream: Stream) -> None:
        """A line of how far a stream has come, where there is a terminal and no answer is being written on it."""
        if self._typing and stream.inbox.ended:
            self._typing = False
            self.say(f"{stream.source.name} has ended; questions are still answered, and Ctrl-D ends")
        with self._lock:
            if not self._shows or self._answering or time.monotonic() < self._next:
                return
            self._clear()
            frames, questions = stream.inbox.waiting
            line = f"{stream.place.time:.1f} s, {stream.looked} frames, {stream.rates.fps:.1f} a second; waiting: "
            line += f"{frames} frames, {questions} questions; dropped: {stream.notes.counts['dropped']}"
            print(line, end="", file=sys.stderr, flush=True)
            self._width, self._next = len(line), time.monotonic() + 0.5

    def _clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0

    def _begin(self, seconds: float, question: str) -> None:
        with self._lock:
            self._clear()
            self._answering = True
            print(f"[{seconds:.2f} s] {question}", flush=True)

    def _piece(self, piece: str) -> None:
        with self._lock:
            self._clear()
            print(piece, end="", flush=True)

    def _end(self, problem: str | None) -> None:
        with self._lock:
            self._answering = False
            print(flush=True)
            if problem:
                print(f"error: {problem}", file=sys.stderr, flush=True)
