"""How the memory of a video is written: by one process at a time, so that it goes on wherever that was stopped."""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlmem_jax.agent.calls import Call, Reply, T, Work
from vlmem_jax.agent.nodes import VERSION, Grounding, Node, to_json
from vlmem_jax.agent.schema import Concept
from vlmem_jax.agent.store import (
    APPLICATION,
    FILE,
    LAYERS,
    TABLES,
    Layer,
    State,
    Store,
    check_made,
    check_version,
    connect,
    reply_json,
    telling,
)
from vlmem_jax.agent.vectors import as_stored

LOCK = "writer.lock"
AT_ONCE = 16
"""Calls that are asked for together, and lost together by whoever is stopped."""

MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {}
"""What makes a file of each version one of the next."""

_LAYER_OF: dict[type, Layer] = {kind: layer for layer, kind in LAYERS.items()}


@contextlib.contextmanager
def write_store(folder: str | Path, made: Mapping[str, Any]) -> Iterator["Writer"]:
    """The memory in a folder, to be begun or gone on with.

    `made`: what it is made of and with. Raises ValueError, naming what differs, if that is not what it was begun with,
    and, naming the other, if somebody is writing it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lease(folder):
        file = folder / FILE
        db = connect(file, "rwc")
        try:
            with telling(file):
                is_new = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if not is_new and check_version(db, file) < VERSION:
                db.close()
                _migrate(file)
                db = connect(file, "rwc")
            with telling(file):
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
            store = Writer(folder, db)
            if is_new:
                store._begin(made)
            check_made(store, made)
            yield store
            with contextlib.suppress(OSError):  # somebody is reading: the file stays in two parts, which is all right
                store.rows("PRAGMA journal_mode = DELETE")
        finally:
            db.close()


@contextlib.contextmanager
def lease(folder: Path) -> Iterator[None]:
    """Nobody else writes in a folder meanwhile. Raises ValueError, naming whoever does.

    The lock is the system's, so that it ends with the process, however that ends; its file says whose it is."""
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder} is being written by {_holder(file)}; wait for it, or stop it") from error
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        file.flush()
        yield


def _holder(file: IO[str]) -> str:
    file.seek(0)
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.load(file)
        return f"process {told['pid']} on {told['host']}"
    return "another process"


def _migrate(file: Path) -> None:
    """Brings a file up to date: a copy of it, which takes its place when it is complete."""
    copy = file.with_name(f".{file.name}.migrating")
    copy.unlink(missing_ok=True)
    with telling(file), contextlib.closing(connect(file, "rwc")) as old:
        old.execute("PRAGMA journal_mode = DELETE")  # so that the file is all there is; raises while somebody reads
        with contextlib.closing(connect(copy, "rwc")) as new:
            old.backup(new)
            for version in range(check_version(new, copy), VERSION):
                new.execute("BEGIN IMMEDIATE")
                MIGRATIONS[version](new)
                new.execute(f"PRAGMA user_version = {version + 1}")
                new.execute("COMMIT")
    os.replace(copy, file)


class Writer(Store):
    """A memory that is written; see `write_store`."""

    def _begin(self, made: Mapping[str, Any]) -> None:
        with self.transaction() as batch:
            for statement in TABLES.split(";")[:-1]:
                self.rows(statement)
            self.rows(f"PRAGMA application_id = {APPLICATION}")
            self.rows(f"PRAGMA user_version = {VERSION}")
            batch._set("made", made)
            batch.mark("building")

    @contextlib.contextmanager
    def transaction(self) -> Iterator["Batch"]:
        """What is put into it is kept when it ends, all of it, or nothing where anything is raised."""
        self.rows("BEGIN IMMEDIATE")
        try:
            yield Batch(self)
            self.frames.settle()
            self.rows("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk may have ended it
                self._db.rollback()
            raise


class Batch:
    """What goes into a transaction. What is there already, by its number or its key, gives way."""

    def __init__(self, store: Writer):
        self._store = store

    def put(self, node: Node, vectors_GD: np.ndarray | None = None) -> None:
        """A node with its vectors. Raises ValueError for a frame that has no file, and for vectors of another width."""
        for frame in getattr(node, "frames", ()):
            if not self._store.frames.path(frame.name).exists():
                raise ValueError(f"a frame must be written before a node shows it; there is no {frame.name}")
        layer = _LAYER_OF[type(node)]
        times = getattr(node, "start", None), getattr(node, "end", None)
        values = layer, node.number, *times, to_json(node)
        self._store.rows("INSERT OR REPLACE INTO node VALUES (?, ?, ?, ?, ?)", *values)
        self._store.rows("DELETE FROM vector WHERE layer = ? AND number = ?", layer, node.number)
        if vectors_GD is None:
            return
        x_GD = as_stored(vectors_GD)
        width = self._store.fact("width", 0)
        if not width:
            self._set("width", width := x_GD.shape[1])
        if x_GD.shape[1] != width:
            raise ValueError(f"{self._store.file} holds vectors of {width} numbers, got {x_GD.shape[1]}")
        for part, x_D in enumerate(x_GD.astype(np.float16)):
            self._store.rows("INSERT INTO vector VALUES (?, ?, ?, ?)", layer, node.number, part, x_D.tobytes())

    def put_concept(self, one: Concept) -> None:
        """A concept of a `Schema`, as it is now."""
        node = Grounding(one.number, one.kind, one.name, tuple(one.glosses), tuple(one.episodes))
        self.put(node, np.stack(one.vectors_GD))

    def reply(self, call: Call, reply: Reply) -> None:
        """What the model answered, so that it is not asked again."""
        values = call.key, call.kind, len(call.frames), *reply_json(reply)
        self._store.rows("INSERT OR REPLACE INTO call VALUES (?, ?, ?, ?, ?)", *values)

    def mark(self, state: State) -> None:
        """How far the memory is."""
        self._set("state", state)

    def _set(self, key: str, value: Any) -> None:
        self._store.rows("INSERT OR REPLACE INTO fact VALUES (?, ?)", key, json.dumps(value))


def journalled(work: Work[T], store: Writer, at_once: int = AT_ONCE) -> Work[T]:
    """The same work, of whose calls those in the store are not made again, and the others are kept as they end.

    `at_once`: how many are asked for together. The memory that comes of it is the same wherever it was stopped, as far
    as replies do not depend on what is asked beside them.
    """
    replies: list[Reply] | None = None
    while True:
        try:
            calls = work.send(replies)
        except StopIteration as end:
            return end.value
        known = {call.key: store.reply(call.key) for call in calls}
        left = iter({call.key: call for call in calls if known[call.key] is None}.values())
        while asked := list(itertools.islice(left, at_once)):
            answered = yield asked
            with store.transaction() as batch:
                for call, reply in zip(asked, answered, strict=True):
                    batch.reply(call, reply)
                    known[call.key] = store.reply(call.key)
        replies = [known[call.key] for call in calls]
