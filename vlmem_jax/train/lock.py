"""One run in a folder: a file that tells who works there, kept fresh while they do.

On a disk it is made by an exclusive create, which one of two wins. In a bucket (gs://) two may write at the same time:
the one that finds itself in the file a moment later has won.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from vlmem_jax.config import ConfigError
from vlmem_jax.paths import AnyPath, is_remote, write_whole

NAME = "run.lock"
"""Of a run in its workdir."""
BEAT = 15.0
"""Seconds between signs of life."""
SILENCE = 2.5 * BEAT
"""Seconds without a sign after which the run of another machine counts as gone."""
SETTLE = 2.0
"""Seconds in which another writer of a bucket would have written, too."""


@contextlib.contextmanager
def locked(
    folder: AnyPath, say: Callable[[str], None] = print, name: str = NAME, knob: str = "--workdir"
) -> Iterator[None]:
    """Keeps the folder, or what is locked by a file of that name in it, for this process. A lock whose run is gone is
    told by `say`, and taken over. `knob`: what errors tell to change.

    Raises ConfigError, naming host, process and time, where another run works there. That takes SILENCE to find out
    where it ran on another machine.
    """
    file, mine = folder / name, _facts()
    _take(file, mine, say, knob)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, mine, done), name="run.lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        if _read(file).get("token") == mine["token"]:
            file.unlink(missing_ok=True)


def _facts() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _take(file: AnyPath, mine: dict[str, Any], say: Callable[[str], None], knob: str) -> None:
    content = json.dumps(mine).encode()
    if not is_remote(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            with open(file, "xb") as new:
                new.write(content)
            return
    if found := _read(file):
        who = f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}"
        if _alive(file, found, say, who):
            raise ConfigError(
                f"another run works in {file.parent}: {who}. Use another {knob}, or stop that one; if it is gone, "
                f"remove {file}"
            )
        say(f"{file.parent} was left by {who}, which is gone; going on from there")
    write_whole(file, content)
    if is_remote(file):
        time.sleep(SETTLE)
    if (winner := _read(file)).get("token") != mine["token"]:
        raise ConfigError(f"another run began in {file.parent} at the same time: process {winner.get('pid')} on "
                          f"{winner.get('host')}")  # fmt: skip


def _alive(file: AnyPath, found: dict[str, Any], say: Callable[[str], None], who: str) -> bool:
    """Whether the run that a lock tells of still works: by its process on this machine, else by its signs of life."""
    if found.get("host") == socket.gethostname() and found.get("born") is not None:
        return found["pid"] != os.getpid() and _born(found["pid"]) == found["born"]
    say(f"waiting up to {SILENCE:.0f} s for a sign of life of {who}")
    end = time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, SILENCE / 10))
        if (now := _read(file)) != found:
            return bool(now)
    return False


def _born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the machine did; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _beat(file: AnyPath, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT):
        mine["beat"] += 1
        with contextlib.suppress(Exception):  # of many kinds in a bucket; the next one may succeed
            if _read(file).get("token") == mine["token"]:
                write_whole(file, json.dumps(mine).encode())


def _read(file: AnyPath) -> dict[str, Any]:
    """What a lock tells; nothing where there is none, or none that can be read."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
