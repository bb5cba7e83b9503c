"""Memories of many videos in one folder."""

import difflib
import errno
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmem_jax.agent.embed import Mark
from vlmem_jax.agent.index import ExactIndex, Found, Indexed, VectorIndex
from vlmem_jax.agent.store import FILE, Layer, State, Store, check_id, open_store, plain_name
from vlmem_jax.agent.writing import lease

SEARCHED: tuple[Layer, ...] = ("segment", "episode", "concept")
"""Layers whose nodes have vectors."""
TOGETHER = 256
"""Memories that an index takes at a time."""


class Entry(NamedTuple):
    """A memory in a list."""

    video: str
    state: State | None
    counts: dict[str, int]
    """Nodes by layer."""
    made: dict[str, Any]
    fault: str = ""
    """Why it cannot be read."""


class Library:
    """A folder of memories, each in a folder of its own that is named by the id of its video."""

    def __init__(self, root: str | Path, index: VectorIndex | None = None, mark: Mark | None = None):
        """`index`: what is searched; else all vectors are compared, in this process; `mark`: that of the embedder which
        all of them must be of."""
        self.root, self._mark = Path(root), mark
        self.index: VectorIndex = ExactIndex() if index is None else index

    def videos(self) -> list[str]:
        """Ids of all videos, in order."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{FILE}"))

    def folder(self, video: str) -> Path:
        """Where the memory of a video is, or would be. Raises ValueError for what is no id."""
        return self.root / check_id(video)

    def find(self, digest: str) -> str | None:
        """The video that holds this, whatever it is called; see `video_id`."""
        return next((video for video in self.videos() if video.endswith(f"-{digest[:16]}")), None)

    def named(self, name: str | None = None) -> str:
        """The video whose id begins with `name`, or the only one. Raises ValueError, naming them, if there are several,
        and FileNotFoundError if there is none."""
        if name in (videos := self.videos()):
            return name
        found = [video for video in videos if video.startswith(plain_name(name or ""))]
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
            raise ValueError(f"{name or self.root} may be any of {len(found)} videos, {shown}; give more of its name")
        told = "there is no memory of this video" + self._like(name or "")
        raise FileNotFoundError(errno.ENOENT, told if name else "there are no memories here", name or str(self.root))

    def open(self, video: str, made: Mapping[str, Any] | None = None) -> Store:
        """The memory of a video. Raises FileNotFoundError, naming those with names like it, if there is none."""
        if not (self.folder(video) / FILE).exists():
            raise FileNotFoundError(errno.ENOENT, f"there is no memory of this video{self._like(video)}", video)
        return open_store(self.folder(video), made)

    def _like(self, video: str) -> str:
        near = difflib.get_close_matches(video, self.videos(), n=3, cutoff=0.5)
        return f", but of {', '.join(near)}" if near else ""

    def entries(self) -> Iterator[Entry]:
        """All memories, those that cannot be read as well."""
        for video in self.videos():
            try:
                with self.open(video) as store, store.moment():
                    yield Entry(video, store.state, store.counts(), store.made)
            except (ValueError, OSError) as error:
                yield Entry(video, None, {}, {}, str(error))

    def remove(self, video: str) -> None:
        """Removes a memory, readable or not. Raises ValueError while somebody writes it, and FileNotFoundError, naming
        those with names like it, if there is none."""
        folder = self.folder(video)
        if not (folder / FILE).exists():
            raise FileNotFoundError(errno.ENOENT, f"there is no memory of this video{self._like(video)}", video)
        with lease(folder):
            (folder / FILE).unlink()  # from here on it is no memory, whatever is left of the rest
            shutil.rmtree(folder)
        self.index.remove([video])

    # --- search -------------------------------------------------------------------------------------------------------

    def refresh(self) -> tuple[list[str], list[str]]:
        """Has the index hold the memories that are closed, as they are now. Gives the videos that it took, and those
        that it forgot. Raises ValueError, naming the memory, for vectors of another embedder."""
        known = self.index.marks()
        there = {video: _mark(self.folder(video)) for video in self.videos()}
        changed = [video for video, mark in there.items() if known.get(video) != mark]
        gone, taken = sorted(known.keys() - there.keys()), []
        for first in range(0, len(changed), TOGETHER):
            some = changed[first : first + TOGETHER]
            memories = [one for video in some if (one := self._indexed(video, there[video]))]
            open_again = {video for video in some if video in known} - {one.video for one in memories}
            gone += sorted(open_again)
            self.index.put(memories)
            taken += [one.video for one in memories]
        self.index.remove(gone)
        return taken, gone

    def _indexed(self, video: str, mark: str) -> Indexed | None:
        try:
            with self.open(video) as store, store.moment():
                if store.state != "closed":
                    return None
                made = store.made.get("embedder")
                indexed = Indexed(video, mark, {layer: store.vectors(layer) for layer in SEARCHED})
        except (ValueError, OSError):  # `entries` says what is wrong with it
            return None
        if self._mark is not None and made is not None:
            self._mark.check(made, str(self.folder(video)))
        return indexed

    def search(
        self, layer: Layer, query_D: np.ndarray, most: int = 10, videos: Collection[str] | None = None
    ) -> list[Found]:
        """The nodes nearest to a query in all memories, or in some, as `refresh` last saw them.

        Raises ValueError for a layer without vectors, and for a query of another width.
        """
        if layer not in SEARCHED:
            raise ValueError(f"nodes of layers {', '.join(SEARCHED)} have vectors; got {layer}")
        return self.index.search(layer, query_D, most, videos)


def _mark(folder: Path) -> str:
    """Another one once somebody has written."""
    facts = [path.stat() for path in (folder / FILE, folder / f"{FILE}-wal") if path.exists()]
    return " ".join(f"{one.st_mtime_ns} {one.st_size}" for one in facts)
