"""Builds a memory in a process that is killed at one statement of SQL after the other that changes it, each time in a
new folder, and goes on in a second process; prints what came of it as JSON.

    python -m tests.agent.killed FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

from tests.agent.scripted import segment
from tests.agent.stores import MADE, axis, jpeg
from vlmem_jax.agent import writing
from vlmem_jax.agent.building import build
from vlmem_jax.agent.calls import Reply, run
from vlmem_jax.agent.checking import repair, verify
from vlmem_jax.agent.manager import ACTIONS
from vlmem_jax.agent.nodes import Extracted, Frame
from vlmem_jax.agent.store import connect, open_store
from vlmem_jax.agent.writing import journalled, write_store


class Logged:
    """Answers by what is asked, and notes each call in a file before it does."""

    def __init__(self, path):
        self.path = path

    def answer(self, calls):
        with open(self.path, "a") as file:
            file.writelines(f"{call.key}\n" for call in calls)
        return [self._reply(call) for call in calls]

    def _reply(self, call):
        if call.kind == "decide":
            chosen = (int(call.key, 16) + 1) % 3
            return Reply(tokens=[(label, -0.1 - 3.3 * (n != chosen)) for n, label in enumerate(ACTIONS)])
        if call.kind == "extract":
            return Reply('{"scenes": [{"location": "kitchen"}]}')
        return Reply(f"{call.kind} of {len(call.frames)} frames, {call.key}")


def make(folder, log, kill_at):
    """A memory of four segments; the process ends at the statement of that number."""
    statements = 0

    def count(statement):
        nonlocal statements
        is_change = not statement.startswith("SELECT")
        statements += is_change
        if is_change and statements == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(file, mode):
        db = connect(file, mode)
        db.set_trace_callback(count)
        return db

    with mock.patch.object(writing, "connect", counted), write_store(folder, MADE) as store:
        names = [store.frames.write(jpeg(50 * n)) for n in range(2)]

        def frames_of(span, fps):
            return tuple(Frame(names[n % 2], n / fps) for n in range(int(span.start * fps), int(span.end * fps)))

        segments = [segment(n) for n in range(4)]
        segments = [type(one)(one.number, one.start, one.end, "", frames_of(one, 0.2)) for one in segments]
        pyramid = run(journalled(build(segments, frames_of=frames_of), store, at_once=2), Logged(log))
        with store.transaction() as batch:
            for one in pyramid.segments:
                batch.put(one, axis(one.number))
            for one in pyramid.episodes:
                batch.put(one, axis(one.number))
                batch.put(Extracted(one.number, one.start, one.end, pyramid.extracted[one.number]))
            batch.mark("closed")
        return statements


def in_process(folder, log, kill_at=0):
    """Makes the memory in a process of its own; gives whether that was killed."""
    if not (child := os.fork()):
        make(folder, log, kill_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status)


def left(folder):
    """What a reader finds after a kill: keys of finished calls, numbers of nodes by layer, the state."""
    try:
        with open_store(folder) as store:
            return [key for (key,) in store.rows("SELECT key FROM call")], store.counts(), store.state
    except (ValueError, FileNotFoundError):  # it was killed before there was anything
        return [], None, "building"


def contents(folder):
    with open_store(folder) as store:
        return list(store._db.iterdump()), store.state, len(store.pyramid().episodes)


def main(folder):
    last = make(folder / "whole", folder / "whole.log", 0)
    wanted = contents(folder / "whole")
    points = []
    for point in range(1, last + 1):
        here, log = folder / str(point), folder / f"{point}.log"
        killed = in_process(here, log, point)
        finished, counts, state = left(here)
        begun = log.read_text().split() if log.exists() else []
        in_process(here, log)
        again = log.read_text().split()[len(begun) :]
        with write_store(here, MADE) as store:
            faults = [fault.told for fault in verify(store)] + [fault.told for fault in repair(store)]
        points.append(
            {
                "killed": killed,
                "finished": len(finished),
                "made twice": len(set(finished) & set(again)),
                "the same": contents(here) == wanted,
                "faults": faults,
                "nodes": counts and sum(counts.values()),
                "state": state,
            }
        )
    calls = (folder / "whole.log").read_text().split()
    print(json.dumps({"points": points, "calls": len(calls), "state": wanted[1], "episodes": wanted[2]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
