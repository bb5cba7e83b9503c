"""Builds memories of video files and folders of pictures.

Stopped at any time, the same command goes on, and makes no call of the model again that was answered. Keys of the
config (vlmem_jax/agent/config.py) are changed by --config.KEY=VALUE, such as --config.build.images=64; those of
`image`, of the model's own, too. A file of --config has them all.
"""

import argparse
import collections
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Call, Work, run_all
from vlmem_jax.agent.config import PRESETS, AgentConfig, resolve
from vlmem_jax.agent.embed import LexicalEmbedder
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.memory import engine_for, finder
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.recording import Recorder, content_digest, made_of, remember
from vlmem_jax.agent.store import video_id
from vlmem_jax.agent.subtitles import SILENT, Track, read_subtitles
from vlmem_jax.agent.writing import Writer, write_store
from vlmem_jax.cli import answering
from vlmem_jax.cli.memory_ask import add_embedder, embedder
from vlmem_jax.cli.memory_plan import run_plan
from vlmem_jax.cli.memory_show import clock
from vlmem_jax.config import override
from vlmem_jax.evals.digest import digest
from vlmem_jax.generate import LoadedModel, load_model
from vlmem_jax.processing.video import probe
from vlmem_jax.stream import Notes, Reading, Shown, Source, kind_of, open_source

EXAMPLE = """vlmem memory build --video my/*.mp4 --store runs/memories --checkpoint RUN
  vlmem memory build --video day.mp4 --store runs/memories --checkpoint RUN --preset paper --config.ingest.fps=2"""
TOLD_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem memory build`."""
    parser.add_argument("--video", nargs="+", required=True, metavar="FILE", help="video files and folders of pictures")
    parser.add_argument("--fps", type=float, default=1.0, help="pictures a second of a folder (%(default)s)")
    parser.add_argument("--subtitles", metavar="DIR", help="folder of subtitles, NAME.srt of NAME.mp4 (default: none)")
    parser.add_argument(
        "--together",
        type=int,
        default=4,
        metavar="N",
        help="videos, and calls, that go side by side (%(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="cut the videos, and tell calls, tokens, TFLOP, disk and hours on a chip"
    )
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, and how it builds."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="the model: a workdir, a converted folder, or a folder or repository of Hugging Face",
    )
    parser.add_argument("--adapter", metavar="NAME", help="its adapter to build with, or none (default: the first)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a config to start from (default: default)")
    add_embedder(parser)
    answering.add_mesh(parser)


class Settings(NamedTuple):
    """What the line asks for."""

    config: AgentConfig
    image: dict[str, Any]
    """Keys of the model's config of images."""


def settings(args: argparse.Namespace) -> Settings:
    """The config of the flags. Raises ConfigError for keys that there are not."""
    start = args.experiment if args.experiment is not None else override(ConfigDict(), args.overrides)
    given = start.to_dict()
    image = given.pop("image", {})
    return Settings(resolve(given | ({"preset": args.preset} if args.preset else {}), "config"), image)


def load(args: argparse.Namespace, image: dict[str, Any]) -> LoadedModel:
    """The model, with a word on the terminal. Raises ValueError for what cannot be loaded."""
    print(f"loading {args.checkpoint}", file=sys.stderr)
    model = load_model(args.checkpoint, answering.mesh(args), adapter=args.adapter)
    return model.showing(image, "config.image") if image else model


def about(args: argparse.Namespace, model: LoadedModel, image: dict[str, Any]) -> dict[str, Any]:
    """What a memory notes of the model that builds it, and of what that is shown."""
    named = {"checkpoint": args.checkpoint, "model": digest(model.params), "adapter": args.adapter}
    return named | {"image": image, "fps": args.fps}


def run(args: argparse.Namespace) -> int:
    """0 when all videos are there, 1 when some could not be remembered, 130 when stopped."""
    if args.together < 1:
        raise ValueError(f"--together must be at least 1, got {args.together}")
    config, image = settings(args)
    if args.subtitles and not Path(args.subtitles).is_dir():
        raise ValueError(f"--subtitles is a folder of SRT files, got {args.subtitles}")
    library, texts, names = Library(args.store), embedder(args) or LexicalEmbedder(), _names(args.video)
    tracks = {name: _track(name, args.subtitles) for name in names}
    for name in names:
        open_source(name, Reading(args.fps))  # what cannot be opened is found before the model is loaded
    if args.dry_run:
        return run_plan(args, names, tracks, config, image)
    model = load(args, image)
    is_said = any(track.cues for track in tracks.values())
    engine, failed = engine_for(model, config, args.together, is_said), 0
    made_by = about(args, model, image)
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(_bar())
        for first in range(0, len(names), args.together):
            with contextlib.ExitStack() as group:
                jobs = [
                    job
                    for name in names[first : first + args.together]
                    if (job := _job(name, tracks[name], library, config, texts, made_by, model, args.fps, group, bar))
                ]
                if not jobs:
                    continue
                answers = EngineModel(engine, model.processor, finder([job.store.frames for job in jobs]))
                try:
                    run_all([job.work() for job in jobs], answers)
                except KeyboardInterrupt:
                    bar.stop()
                    print("stopped; the same command goes on", file=sys.stderr)
                    return 130
                failed += sum(bool(job.failure) for job in jobs)
    return 1 if failed else 0


def _names(given: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(given))
    if live := [name for name in names if kind_of(name) not in ("file", "folder")]:
        raise ValueError(f"a memory is built of files and folders; {live[0]} is live")
    return names


def _track(name: str, folder: str | None) -> Track:
    """The subtitles of a video: NAME.srt of its NAME.mp4, if it is there."""
    file = Path(folder or "") / f"{Path(name).stem}.srt"
    return Track(read_subtitles(file)) if folder and file.exists() else SILENT


def _job(name, track, library, config, embedder, made_by, model, fps, group, bar) -> "_Job | None":
    """What is to be done for a video, or None where that is done."""
    mark = content_digest(name)
    video = library.find(mark) or video_id(Path(name).resolve().name, mark)
    folder = library.folder(video)
    made = made_of(video, mark, made_by, embedder, config, track)
    if video in library.videos():
        with library.open(video) as known:  # a checkpoint may have been moved: its digest tells
            made["checkpoint"] = known.made.get("checkpoint", made["checkpoint"])
    store = group.enter_context(write_store(folder, made))
    notes = Notes(lambda text: bar.console.print(text, markup=False, highlight=False))
    if store.state == "closed":
        bar.console.print(f"{video}: is there already", markup=False, highlight=False)
        return None
    limits = {"max_pixels": model.processor.open_limit, "config": model.processor.image, "notes": notes}
    source = open_source(name, Reading(fps, **limits))
    return _Job(video, source, store, Recorder(store, config, embedder, track), notes, bar, _length(name))


def _length(name: str) -> float | None:
    """Seconds that a file says it has."""
    with contextlib.suppress(ValueError, OSError):
        clip = probe(name)
        return clip.frames / clip.fps
    return None


class _Job:
    """A video that is being remembered, and how far that has come."""

    def __init__(
        self,
        video: str,
        source: Source,
        store: Writer,
        recorder: Recorder,
        notes: Notes,
        bar: Progress,
        length: float | None,
    ):
        self.video, self.store, self.failure = video, store, ""
        self._source, self._recorder, self._notes, self._bar = source, recorder, notes, bar
        self.name, self.live = source.name, source.live
        self._known = sum(one.calls for one in store.cost().values())
        self._made: collections.Counter[str] = collections.Counter()
        self._began = self._said = time.monotonic()
        self._task = bar.add_task(video, total=length, told="")

    def __iter__(self) -> Iterator[Shown]:
        for shown in self._source:
            self._tell(shown.time)
            yield shown

    def work(self) -> Work[None]:
        """All of it; what cannot be read ends this video alone."""
        try:
            pyramid = yield from self._counted(remember(self, self._recorder, self.store, self._notes))
        except (ValueError, OSError) as error:
            self.failure = str(error)
            self._bar.console.print(f"{self.video}: {error}", markup=False, highlight=False)
            return
        length = max((one.end for one in pyramid.segments), default=0.0)
        self._bar.update(self._task, total=length, completed=length, told=self._told(length))
        print(f"{self.video}: {self._told(length)}", flush=True)

    def _counted(self, work: Work[Pyramid]) -> Work[Pyramid]:
        replies = None
        while True:
            try:
                calls: list[Call] = work.send(replies)
            except StopIteration as end:
                return end.value
            self._tell(self._recorder.time)
            replies = yield calls
            self._made.update(call.kind for call in calls)

    def _tell(self, seconds: float) -> None:
        self._bar.update(self._task, completed=seconds, told=self._told(seconds))
        if self._bar.disable and time.monotonic() - self._said > TOLD_EVERY:
            self._said = time.monotonic()
            print(f"{self.video}: {self._told(seconds)}", file=sys.stderr, flush=True)

    def _told(self, seconds: float) -> str:
        known = f", {self._known} were there" * bool(self._known)
        counts = f"{len(self._recorder.pyramid.segments)} segments, {self.store.counts()['episode']} episodes"
        speed = seconds / max(time.monotonic() - self._began, 1e-9)
        return f"{clock(seconds)}, {counts}, {self._made.total()} calls{known}; {speed:.2f} x real time"


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description} {task.fields[told]}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
