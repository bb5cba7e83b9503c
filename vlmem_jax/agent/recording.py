"""The memory of a video as it is written while somebody watches: nodes go into a store as they are closed, with their
vectors, and calls as they are answered."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Work
from vlmem_jax.agent.config import AgentConfig
from vlmem_jax.agent.embed import Embedder
from vlmem_jax.agent.nodes import Episode, Extracted, Segment
from vlmem_jax.agent.schema import Schema, Texts
from vlmem_jax.agent.store import State
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.subtitles import SILENT, Track
from vlmem_jax.agent.vectors import as_stored
from vlmem_jax.agent.watching import keeper, watch
from vlmem_jax.agent.writing import Batch, Writer, journalled
from vlmem_jax.config import to_dict
from vlmem_jax.stream.frames import Source
from vlmem_jax.stream.notes import Notes

READ = 2**20
"""Bytes of the beginning, and of the end, of a file by which it is known."""


def content_digest(source: str | os.PathLike) -> str:
    """Tells a video file, or a folder of pictures, from others: by its size, its beginning and its end, and by those of
    all files of a folder and their names. 32 hexadecimal digits. Raises OSError."""
    content, path = hashlib.blake2b(digest_size=16), Path(source)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        name = file.name if path.is_dir() else ""
        size = file.stat().st_size
        with open(file, "rb") as opened:
            head = opened.read(READ)
            opened.seek(max(size - READ, len(head)))
            content.update(repr((name, size, head, opened.read(READ))).encode())
    return content.hexdigest()


def made_of(
    video: str, digest: str, model: Mapping[str, Any], embedder: Embedder, config: AgentConfig, track: Track = SILENT
) -> dict[str, Any]:
    """What a memory is made of and with, as `write_store` takes it; keys of the config each by their own name, so that
    what differs is told by it."""
    return {
        "video": video,
        "content": digest,
        **model,
        "subtitles": track.digest,
        "embedder": embedder.mark._asdict(),
        **{f"config.{key}": value for key, value in flat(to_dict(config)).items()},
    }


def flat(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their keys with dots between."""
    found: dict[str, Any] = {}
    for key, value in groups.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{below}": one for below, one in flat(value).items()}
        else:
            found[key] = value
    return found


class Recorder:
    """A `StreamBuilder` whose memory stands in a store."""

    def __init__(self, store: Writer, config: AgentConfig, embedder: Embedder, track: Track = SILENT):
        """`track`: the subtitles."""
        self._store, self._embedder, self._track = store, embedder, track
        self._stream = StreamBuilder(keeper(store.frames.write, config.ingest), config.ingest, config.build, track)
        self._schema = Schema(config.schema) if config.index == "concepts" else None
        self._saved = 0, 0
        self.time = 0.0
        """Of the last frame, in seconds."""

    @property
    def pyramid(self) -> Pyramid:
        """What is closed."""
        return self._stream.builder.pyramid

    def push(self, frame_HWc: UInt8[np.ndarray, "H W 3"], time: float) -> Work[list[Segment]]:
        """As `StreamBuilder.push`."""
        closed = yield from self._stream.push(frame_HWc, time)
        self.time = time
        self._save(self.pyramid)
        return closed

    def flush(self, end: float) -> Work[list[Segment]]:
        """As `StreamBuilder.flush`."""
        closed = yield from self._stream.flush(end)
        self._save(self.pyramid)
        return closed

    def snapshot(self) -> Work[Pyramid]:
        """As `StreamBuilder.snapshot`; nothing of it is written."""
        return (yield from self._stream.snapshot())

    def close(self, state: State = "closed") -> Work[Pyramid]:
        """The memory as it is if the video ends here, which is written."""
        pyramid = yield from self._stream.snapshot()
        self._save(pyramid, state)
        return pyramid

    def _save(self, pyramid: Pyramid, state: State | None = None) -> None:
        segments, episodes = (nodes[n:] for nodes, n in zip(pyramid[:2], self._saved, strict=True))
        if not (segments or episodes or state):
            return
        with self._store.transaction() as batch:
            new, builder = Pyramid(segments, episodes, pyramid.extracted), self._stream.builder
            put_nodes(batch, new, self._schema, self._embedder, builder.text)
            for one in episodes:
                said, frames = pyramid.extracted[one.number], builder.shown(one)
                batch.put(Extracted(one.number, one.start, one.end, said, frames))
            for cue in self._track.begun(segments[0].start, segments[-1].end) if segments else ():
                batch.put(cue)
            if state:
                batch.mark(state)
        self._saved = len(pyramid.segments), len(pyramid.episodes)


def put_nodes(
    batch: Batch,
    new: Pyramid,
    schema: Schema | None,
    embedder: Embedder,
    text: Callable[[Segment | Episode], str] = lambda node: node.caption,
) -> None:
    """Segments and episodes with the vectors of their `text`, and the concepts of a schema that these episodes ground,
    if there is one."""

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        return as_stored(embedder(texts))

    nodes = [*new.segments, *new.episodes]
    for one, vector_D in zip(nodes, embed([text(one) for one in nodes]) if nodes else (), strict=True):
        batch.put(one, vector_D)
    for one in new.episodes if schema else ():
        for concept in schema.add(one.number, Texts.of(new.extracted[one.number]), embed):
            batch.put_concept(concept)


def remember(source: Source, recorder: Recorder, store: Writer, notes: Notes) -> Work[Pyramid]:
    """The memory of all that a source shows, in a store, where it is gone on with if it was stopped. Raises ValueError
    if nothing can be decoded."""

    def whole() -> Work[Pyramid]:
        yield from watch(source, recorder, notes)
        return (yield from recorder.close())

    return (yield from journalled(whole(), store))
