"""The memory of a video, kept in a folder: one SQLite file with its nodes, their vectors and the calls that were made
for them, and its frames as JPEG files beside it.

Any number of processes read a store while one writes it, see `writing`. A transaction is there as a whole or not at
all; frames are written before the transaction that names them.
"""

import contextlib
import errno
import json
import re
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Cost, Reply
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.nodes import VERSION, Cue, Episode, Extracted, Grounding, Node, Segment, T, from_json
from vlmem_jax.agent.schema import Concept
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.vectors import Hit, Vectors

FILE = "memory.sqlite"
APPLICATION = 0x766C6D6D
"""What SQLite's header says that the file is of: "vlmm"."""

Layer = Literal["segment", "episode", "extracted", "concept", "cue"]
LAYERS: dict[Layer, type[Node]] = {
    "segment": Segment,
    "episode": Episode,
    "extracted": Extracted,
    "concept": Grounding,
    "cue": Cue,
}
State = Literal["building", "open", "closed"]
"""`open`: of a stream that goes on, but may be asked; `closed`: of a whole video."""

TABLES = """
CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE node (layer TEXT, number INTEGER, start REAL, end REAL, content TEXT NOT NULL,
    PRIMARY KEY (layer, number)) WITHOUT ROWID;
CREATE TABLE vector (layer TEXT, number INTEGER, part INTEGER, x BLOB NOT NULL, PRIMARY KEY (layer, number, part));
CREATE TABLE call (key TEXT PRIMARY KEY, kind TEXT NOT NULL, images INTEGER NOT NULL, reply TEXT NOT NULL,
    cost TEXT NOT NULL) WITHOUT ROWID;
"""
"""Vectors lie apart from nodes, so that either is read without the other."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,79}-[0-9a-f]{16}")


def video_id(name: str, digest: str) -> str:
    """What a video is called in a library: its name, as far as it can stand in a path, and the first 16 hexadecimal
    digits of what it holds, so that two of one name are told apart."""
    return check_id(f"{plain_name(name) or 'video'}-{digest[:16]}")


def plain_name(name: str) -> str:
    """As much of a name as can stand in an id."""
    return _UNSAFE.sub("_", name).lstrip(".-")[:80]


def check_id(video: str) -> str:
    """The id. Raises ValueError for what `video_id` does not make, which may lead anywhere as a path."""
    if not _ID.fullmatch(video):
        raise ValueError(
            f"the id of a video is up to 80 letters, digits and ._- with a dash and 16 hexadecimal digits behind, got "
            f"{video!r:.120}"
        )
    return video


class CallCount(NamedTuple):
    """What was asked of the model, by kind of call."""

    calls: int
    images: int


class Store:
    """A memory that is read; see `open_store`."""

    def __init__(self, folder: Path, connection: sqlite3.Connection):
        self.folder, self.file = folder, folder / FILE
        self.frames = FrameFiles(folder / "frames")
        self._db = connection
        self._kept: dict[Layer, tuple[tuple[int, int], Vectors]] = {}

    def close(self) -> None:
        """Lets go of the file."""
        self._db.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def made(self) -> dict[str, Any]:
        """What the memory was made of and with: the video, models, embedder, config."""
        return self.fact("made", {})

    @property
    def state(self) -> State:
        return self.fact("state", "building")

    def nodes(self, layer: Layer, kind: type[T]) -> list[T]:
        """All nodes of a layer, in order. Raises ValueError, naming the node, for one that is damaged."""
        rows = self.rows("SELECT number, content FROM node WHERE layer = ? ORDER BY number", layer)
        return [self._node(layer, kind, *row) for row in rows]

    def node(self, layer: Layer, kind: type[T], number: int) -> T:
        """One of them. Raises ValueError, naming it, if it is damaged or not there."""
        rows = self.rows("SELECT number, content FROM node WHERE layer = ? AND number = ?", layer, number)
        if not rows:
            raise ValueError(f"{self.file} holds no {layer} {number}")
        return self._node(layer, kind, *rows[0])

    def _node(self, layer: Layer, kind: type[T], number: int, content: str) -> T:
        try:
            return from_json(kind, content)
        except ValueError as error:
            raise ValueError(f"{self.file} is damaged at {layer} {number}: {error}") from error

    def pyramid(self) -> Pyramid:
        """The layers, as of one moment."""
        with self.moment():
            extracted = {one.number: one.said for one in self.nodes("extracted", Extracted)}
            episodes = self.nodes("episode", Episode)
            return Pyramid(
                self.nodes("segment", Segment),
                episodes,
                {one.number: extracted.get(one.number, {}) for one in episodes},
            )

    def concepts(self) -> list[Concept]:
        """Those of a `Schema`, with the vectors they were kept with."""
        with self.moment():
            nodes, vectors = self.nodes("concept", Grounding), self.vectors("concept")
        found = []
        for one in nodes:
            first, last = np.searchsorted(vectors.numbers_N, (one.number, one.number + 1))
            own = list(vectors.x_ND[first:last])
            found.append(Concept(one.number, one.kind, one.name, list(one.glosses), list(one.episodes), own))
        return found

    def cues(self, within: Span) -> list[Cue]:
        """Subtitles that are shown in a stretch of time."""
        return [one for one in self.nodes("cue", Cue) if one.start < within.end and one.end > within.start]

    def reply(self, key: str) -> Reply | None:
        """What the model answered to a call, if it was asked."""
        rows = self.rows("SELECT reply, cost FROM call WHERE key = ?", key)
        return _reply(*rows[0]) if rows else None

    def cost(self) -> dict[str, CallCount]:
        """All that was asked of the model, by kind."""
        rows = self.rows("SELECT kind, count(*), sum(images) FROM call GROUP BY kind ORDER BY kind")
        return {kind: CallCount(*counts) for kind, *counts in rows}

    def spent(self) -> dict[str, Cost]:
        """What the answers took, by kind of call."""
        took = ", ".join(f"sum(json_extract(cost, '$[{n}]'))" for n in range(len(Cost._fields)))
        return {kind: Cost(*cost) for kind, *cost in self.rows(f"SELECT kind, {took} FROM call GROUP BY kind")}

    def counts(self) -> dict[str, int]:
        """How many nodes each layer has."""
        found = dict(self.rows("SELECT layer, count(*) FROM node GROUP BY layer"))
        return {layer: found.get(layer, 0) for layer in LAYERS}

    # --- search -------------------------------------------------------------------------------------------------------

    def vectors(self, layer: Layer) -> Vectors:
        """All of a layer; they are kept until somebody writes."""
        now = self.rows("PRAGMA data_version")[0][0], self._db.total_changes
        if layer not in self._kept or self._kept[layer][0] != now:
            self._kept[layer] = now, self._read_vectors(layer)
        return self._kept[layer][1]

    def _read_vectors(self, layer: Layer) -> Vectors:
        rows = self.rows(
            "SELECT number, start, end, x FROM vector JOIN node USING (layer, number) WHERE layer = ? "
            "ORDER BY number, part",
            layer,
        )
        width = self.fact("width", 0)
        x_ND = np.frombuffer(b"".join(row[3] for row in rows), np.float16).astype(np.float32)
        if len(x_ND) != len(rows) * width:
            raise ValueError(f"{self.file} is damaged: vectors of layer {layer} are not all of {width} numbers")
        times = np.array([row[1:3] for row in rows], np.float64).reshape(-1, 2)
        return Vectors(x_ND.reshape(len(rows), width), np.array([row[0] for row in rows], np.int64), *times.T)

    def search(
        self,
        layer: Layer,
        query_D: np.ndarray,
        most: int = 10,
        within: Span | None = None,
        among: Collection[int] | None = None,
    ) -> list[Hit]:
        """The nodes nearest to a query, see `Vectors.search`."""
        return self.vectors(layer).search(query_D, most, within, among)

    # --- SQLite -------------------------------------------------------------------------------------------------------

    def fact(self, key: str, otherwise: Any) -> Any:
        """What is noted of the whole."""
        rows = self.rows("SELECT value FROM fact WHERE key = ?", key)
        return json.loads(rows[0][0]) if rows else otherwise

    def rows(self, statement: str, *values: Any) -> list[tuple]:
        """What SQL finds."""
        with telling(self.file):
            return self._db.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def moment(self) -> Iterator[None]:
        """What is read here is of one state of the file, whatever is written meanwhile."""
        if self._db.in_transaction:
            yield
            return
        self.rows("BEGIN")
        try:
            yield
        finally:
            self.rows("COMMIT")


def open_store(folder: str | Path, made: Mapping[str, Any] | None = None) -> Store:
    """Reads the memory in a folder, and changes nothing.

    `made`: what it must have been made with, as far as given. Raises ValueError, naming both, if it was not, if the
    file is damaged, or of another version; and FileNotFoundError if there is none.
    """
    file = Path(folder) / FILE
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, "there is no memory in this folder", str(folder))
    store = Store(file.parent, connect(file, "ro"))
    try:
        if (version := check_version(store._db, file)) < VERSION:
            raise ValueError(
                f"{file} is of version {version}, and this program reads version {VERSION}; whoever writes it again "
                "brings it up to date"
            )
        check_made(store, made or {})
    except BaseException:
        store.close()
        raise
    return store


def connect(file: Path, mode: Literal["ro", "rwc"]) -> sqlite3.Connection:
    """A connection without transactions of its own."""
    with telling(file):
        uri = f"{file.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10)


def check_version(db: sqlite3.Connection, file: Path) -> int:
    """The version of a file. Raises ValueError if it holds something else, or was written by a later program."""
    with telling(file):
        application, version = (db.execute(f"PRAGMA {key}").fetchone()[0] for key in ("application_id", "user_version"))
    if application != APPLICATION:
        raise ValueError(f"{file} holds no memory of a video")
    if version > VERSION:
        raise ValueError(f"{file} is of version {version}, and this program knows up to {VERSION}; use a later one")
    return version


def check_made(store: Store, made: Mapping[str, Any]) -> None:
    """Raises ValueError, naming what differs, unless a memory was made with all this."""
    known, made = store.made, json.loads(json.dumps(made))
    wrong = [f"{key} {known.get(key)!r:.80}, not {made[key]!r:.80}" for key in made if made[key] != known.get(key)]
    if wrong:
        raise ValueError(f"{store.folder} was made with {'; '.join(wrong)}; use the same, or another folder")


@contextlib.contextmanager
def telling(file: Path) -> Iterator[None]:
    """Says plainly what SQLite says of a file. Raises ValueError for a damaged one, OSError for all else."""
    try:
        yield
    except sqlite3.ProgrammingError:  # ours
        raise
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
            raise ValueError(f"{file} is damaged: {error}; make it again from the video") from error
        code, said = next((told for start, told in _TOLD.items() if name.startswith(start)), (errno.EIO, str(error)))
        raise OSError(code, said, str(file)) from error


_TOLD = {
    "SQLITE_FULL": (errno.ENOSPC, "the disk is full; nothing of the last step was kept: make room, and go on"),
    "SQLITE_BUSY": (errno.EBUSY, "somebody is writing this file, and does not stop"),
    "SQLITE_READONLY": (errno.EROFS, "this file cannot be written"),
    "SQLITE_CANTOPEN": (errno.EACCES, "this file cannot be opened"),
}


def _reply(text: str, cost: str) -> Reply:
    said, tokens = json.loads(text)
    known = tokens if tokens is None else [(token, logp) for token, logp in tokens]
    return Reply(said, known, Cost(*json.loads(cost)))


def reply_json(reply: Reply) -> tuple[str, str]:
    """A reply as the journal holds it, and what it took; log-probabilities come back bit by bit."""
    tokens: Sequence[Any] | None = reply.tokens
    listed = tokens if tokens is None else [[token, float(logp)] for token, logp in tokens]
    return json.dumps([reply.text, listed]), json.dumps(reply.cost)
