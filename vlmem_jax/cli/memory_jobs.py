"""Videos that are being remembered, each a job, and what is told of them meanwhile."""

import collections
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Work
from vlmem_jax.agent.config import AgentConfig
from vlmem_jax.agent.embed import Embedder
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.recording import Recorder, content_digest, made_of, remember
from vlmem_jax.agent.store import video_id
from vlmem_jax.agent.subtitles import SILENT, Track, read_subtitles
from vlmem_jax.agent.writing import Writer, write_store
from vlmem_jax.cli.memory_show import clock
from vlmem_jax.processing import Processor
from vlmem_jax.processing.video import probe
from vlmem_jax.stream import Notes, Reading, Shown, open_source

TOLD_EVERY = 60.0
"""Seconds between two lines of progress where there is no terminal."""


class Video(NamedTuple):
    """A video that was asked for."""

    id: str
    name: str
    digest: str
    track: Track

    @classmethod
    def of(cls, name: str, library: Library, subtitles: str | None) -> "Video":
        """`subtitles`: folder of NAME.srt of a NAME.mp4."""
        mark, file = content_digest(name), Path(subtitles or "") / f"{Path(name).stem}.srt"
        track = Track(read_subtitles(file)) if subtitles and file.exists() else SILENT
        return cls(library.find(mark) or video_id(Path(name).resolve().name, mark), name, mark, track)


class Jobs(NamedTuple):
    """What jobs have in common."""

    library: Library
    config: AgentConfig
    embedder: Embedder
    made_by: dict[str, Any]
    """What is noted of the model."""
    processor: Processor
    fps: float
    bar: Progress
    frames: list[FrameFiles]
    """Of the jobs that go on."""

    def made(self, video: Video) -> dict[str, Any]:
        """What the memory of a video is made of and with. A checkpoint may have been moved: its digest tells it."""
        made = made_of(video.id, video.digest, self.made_by, self.embedder, self.config, video.track)
        with contextlib.suppress(ValueError, OSError), self.library.open(video.id) as known:
            made["checkpoint"] = known.made.get("checkpoint", made["checkpoint"])
        return made

    def say(self, text: str) -> None:
        """A line above those of progress."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def work(self, video: Video) -> Work[str]:
        """The memory of a video; what went wrong, if something did, which ends this video alone."""
        try:
            with write_store(self.library.folder(video.id), self.made(video)) as store:
                self.frames.append(store.frames)
                try:
                    yield from _Job(self, video, store).work()
                finally:
                    self.frames.remove(store.frames)
        except (ValueError, OSError) as error:
            self.say(f"{video.id}: {error}")
            return str(error)
        return ""


class _Job:
    """A video that is being remembered, and how far that has come."""

    def __init__(self, jobs: Jobs, video: Video, store: Writer):
        self._jobs, self._video, self._store = jobs, video, store
        self._notes = Notes(jobs.say)
        limits = {"max_pixels": jobs.processor.open_limit, "config": jobs.processor.image, "notes": self._notes}
        self._source = open_source(video.name, Reading(jobs.fps, **limits))
        self.name, self.live = self._source.name, self._source.live
        self._recorder = Recorder(store, jobs.config, jobs.embedder, video.track)
        self._known = sum(one.calls for one in store.cost().values())
        self._made: collections.Counter[str] = collections.Counter()
        self._began = self._said = time.monotonic()
        self._task = jobs.bar.add_task(video.id, total=_length(video.name), told="")

    def __iter__(self) -> Iterator[Shown]:
        for shown in self._source:
            self._tell(shown.time)
            yield shown

    def work(self) -> Work[None]:
        """All of it."""
        pyramid = yield from self._counted(remember(self, self._recorder, self._store, self._notes))
        length = max((one.end for one in pyramid.segments), default=0.0)
        self._jobs.bar.update(self._task, total=length, completed=length, told=self._told(length))
        print(f"{self._video.id}: {self._told(length)}", flush=True)

    def _counted(self, work: Work[Pyramid]) -> Work[Pyramid]:
        replies = None
        while True:
            try:
                calls = work.send(replies)
            except StopIteration as end:
                return end.value
            self._tell(self._recorder.time)
            replies = yield calls
            self._made.update(call.kind for call in calls)

    def _tell(self, seconds: float) -> None:
        self._jobs.bar.update(self._task, completed=seconds, told=self._told(seconds))
        if self._jobs.bar.disable and time.monotonic() - self._said > TOLD_EVERY:
            self._said = time.monotonic()
            print(f"{self._video.id}: {self._told(seconds)}", file=sys.stderr, flush=True)

    def _told(self, seconds: float) -> str:
        known = f", {self._known} were there" * bool(self._known)
        counts = f"{len(self._recorder.pyramid.segments)} segments, {self._store.counts()['episode']} episodes"
        speed = seconds / max(time.monotonic() - self._began, 1e-9)
        return f"{clock(seconds)}, {counts}, {self._made.total()} calls{known}; {speed:.2f} x real time"


def _length(name: str) -> float | None:
    """Seconds that a file says it has."""
    with contextlib.suppress(ValueError, OSError):
        clip = probe(name)
        return clip.frames / clip.fps
    return None


def progress_bar() -> Progress:
    """Of several videos; nothing where there is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description} {task.fields[told]}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
