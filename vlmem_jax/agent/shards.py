"""Many videos by several processes, on one machine or on several with one folder: each video is claimed by one of them.

A claim is a file that only one process can create. It is touched as long as its process lives; where that has ended,
another may take the video over by the next file, again as the only one. Claims divide the work; what keeps two writers
apart is the lease of a memory itself, see `writing`.
"""

import contextlib
import hashlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmem_jax.agent.library import Library

FOLDER = ".claims"
"""Of a library, where claims are."""
LEASE = 120.0
"""Seconds without a sign of life after which a process on another machine counts as ended."""


class Shard(NamedTuple):
    """A part of all videos: that of process `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    def has(self, video: str) -> bool:
        """Whether a video, by its id, belongs to it; to which does not depend on what else there is."""
        digest = hashlib.blake2b(video.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest) % self.count == self.index


ALL = Shard()


class Claims:
    """The claims of a folder, as one process sees and makes them."""

    def __init__(self, folder: Path, lease: float = LEASE):
        """`lease`: seconds; the same for all processes."""
        if not lease > 0:
            raise ValueError(f"lease must be above 0, got {lease}")
        self._folder, self._lease = folder, lease
        self._me = {"process": os.getpid(), "machine": _machine(), "token": uuid.uuid4().hex}
        self._held: dict[str, Path] = {}
        self._lock, self._stop = threading.Lock(), threading.Event()

    def __enter__(self) -> "Claims":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for video in list(self._held):
            self.release(video)

    def take(self, video: str, steal: bool = False) -> bool:
        """Claims a video, if nobody has; with `steal`, if whoever has it has ended, too."""
        files = self._files(video)
        last = files[-1] if files else None
        before = _content(last) if last else None
        if last and not (steal and self._has_ended(last)):
            return False
        claim = self._folder / f"{video}.{_number(last) + 1 if last else 0}"
        try:
            with open(claim, "x") as file:
                json.dump(self._me, file)
        except FileExistsError:
            return False
        if last and _content(last) != before:  # it was taken over, released and claimed anew meanwhile
            claim.unlink(missing_ok=True)
            return False
        with self._lock:
            self._held[video] = claim
        return True

    def release(self, video: str) -> None:
        """Lets go of a video, done or not; whoever has taken it over keeps it."""
        with self._lock:
            claim = self._held.pop(video)
        for file in self._files(video):  # the last one last: until then it is claimed
            if _number(file) <= _number(claim):
                file.unlink(missing_ok=True)

    def _files(self, video: str) -> list[Path]:
        """Claims of a video, which may have been taken over, in order."""
        found = [file for file in self._folder.glob("*") if file.stem == video and file.suffix[1:].isdecimal()]
        return sorted(found, key=_number)

    def _has_ended(self, claim: Path) -> bool:
        """Whether the process of a claim has: on this machine one can look, and on others it gives no sign."""
        made = _content(claim)
        if made.get("machine") == self._me["machine"] and not _is_running(made.get("process")):
            return True
        sign = self._folder / f".{self._me['token']}"  # the clock of whoever keeps the files, not that of this machine
        sign.touch()
        try:
            return sign.stat().st_mtime - claim.stat().st_mtime > self._lease
        except FileNotFoundError:  # it was released
            return False
        finally:
            sign.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._lease / 4):
            with self._lock:
                for claim in self._held.values():
                    with contextlib.suppress(OSError):
                        os.utime(claim)


def claimed(
    videos: Sequence[str],
    claims: Claims,
    is_done: Callable[[str], bool],
    shard: Shard = ALL,
    steal: bool = False,
) -> Iterator[str]:
    """The videos that this process is to remember, each claimed when it is asked for, to be released by whoever asks.

    Those of its own shard come first; with `steal` then all that nobody has, or whoever had them has ended. Those that
    are done, and those that others are at, are passed over; `left` says which these are.
    """
    own = [video for video in videos if shard.has(video)]
    rest = [video for video in videos if not shard.has(video)] if steal else []
    for video in [*own, *rest]:
        if is_done(video) or not claims.take(video, steal):
            continue
        if is_done(video):  # by somebody who has released it just now
            claims.release(video)
            continue
        yield video


def is_closed(library: Library, video: str) -> bool:
    """Whether the memory of a video is complete; one that is being begun cannot be read yet."""
    with contextlib.suppress(ValueError, OSError), library.open(video) as store:
        return store.state == "closed"
    return False


def left(videos: Sequence[str], is_done: Callable[[str], bool], shard: Shard = ALL) -> list[str]:
    """Those of a shard that are not done: others are at them, or were, until they ended."""
    return [video for video in videos if shard.has(video) and not is_done(video)]


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])


def _content(claim: Path) -> dict[str, Any]:
    """Whose claim it is; nothing of one that is being written, or is gone."""
    with contextlib.suppress(OSError, ValueError):
        made = json.loads(claim.read_text())
        return made if isinstance(made, dict) else {}
    return {}


def _machine() -> str:
    """Where numbers of processes mean the same: a host, and on it a container."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _is_running(process: Any) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, ValueError, OverflowError):
        return True
    return True
