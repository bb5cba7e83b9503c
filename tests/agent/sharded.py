"""A folder of videos that several processes remember, one of which is killed in the midst of a video; prints what each
of them did as JSON.

    python -m tests.agent.sharded FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

from PIL import Image

from tests.agent.killed import Logged
from tests.stream.world import Said
from vlmem_jax.agent.building import BuildConfig
from vlmem_jax.agent.calls import run_flow
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.nodes import Extracted
from vlmem_jax.agent.segments import IngestConfig
from vlmem_jax.agent.shards import FOLDER, Claims, Shard, claimed, is_closed, left
from vlmem_jax.agent.store import open_store, video_id
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.watching import keeper, watch
from vlmem_jax.agent.writing import journalled, write_store
from vlmem_jax.stream import open_source

CONFIG = IngestConfig(threshold=200, longest=2.0, fps=1.0)
COUNT, PROCESSES, DEADLY = 12, 3, 3
"""Videos, processes, and the round of calls in which one of these is killed."""


class Deadly(Logged):
    """Ends its process in one of its rounds, before anything is answered."""

    def __init__(self, path, deadly):
        super().__init__(path)
        self.left = deadly

    def answer(self, calls):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(calls)


def make_videos(folder):
    """Folders of a few pictures, each of its own colour."""
    for n in range(COUNT):
        (folder / f"{n:02}").mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (20 * n, 40 * i, 0)).save(folder / f"{n:02}" / f"{i}.png")


def remembered(source, library, video):
    """The memory of a video, from its folder to its store."""
    reading = Said().reading
    with write_store(library.folder(video), {"video": video}) as store:
        builder = StreamBuilder(keeper(store.frames.write, CONFIG), CONFIG, BuildConfig())

        def whole():
            yield from watch(open_source(str(source), reading), builder, reading.notes)
            return (yield from builder.snapshot())

        pyramid = yield from journalled(whole(), store)
        with store.transaction() as batch:
            for one in (*pyramid.segments, *pyramid.episodes):
                batch.put(one)
            for one in pyramid.episodes:
                batch.put(Extracted(one.number, one.start, one.end, pyramid.extracted[one.number]))
            batch.mark("closed")


def work(folder, shard, steal, deadly=0):
    """One process, from its beginning to its end; notes the videos that it began and those that it has done."""
    library = Library(folder / "memories")
    sources = {video_id(path.name, f"{path.name:0>16}"): path for path in sorted((folder / "videos").iterdir())}

    def note(*words):
        with open(folder / f"{os.getpid()}.log", "a") as log:
            print(*words, file=log)

    def is_done(video):
        return is_closed(library, video)

    def works():
        for video in claimed(list(sources), claims, is_done, shard, steal):
            note("began", video)
            yield video, remembered(sources[video], library, video)

    with Claims(library.root / FOLDER) as claims:
        for video, _ in run_flow(works(), Deadly(folder / f"{os.getpid()}.calls", deadly), most=2):
            claims.release(video)
            note("did", video)
    note("left", *left(list(sources), is_done))


def start(*args):
    """A process that does so."""
    if not (child := os.fork()):
        work(*args)
        os._exit(0)
    return child


def lines(folder, suffix):
    return {path.stem: [line.split() for line in path.read_text().splitlines()] for path in folder.glob(f"*.{suffix}")}


def main(folder):
    make_videos(folder / "videos")
    first = [start(folder, Shard(n, PROCESSES), False, DEADLY * (n == 0)) for n in range(PROCESSES)]
    killed = [os.WIFSIGNALED(os.waitpid(child, 0)[1]) for child in first]
    before, claims = lines(folder, "log"), sorted(path.name for path in (folder / "memories" / FOLDER).iterdir())
    second = [start(folder, Shard(n, 2), True) for n in range(2)]
    failed = [os.waitpid(child, 0)[1] for child in second]
    library = Library(folder / "memories")
    states, finished = [], []
    for video in library.videos():
        with open_store(library.folder(video)) as store:
            states.append(store.state)
            finished += [key for (key,) in store.rows("SELECT key FROM call")]
    calls = [key for of in lines(folder, "calls").values() for [key] in of]
    print(
        json.dumps(
            {
                "killed": killed,
                "failed": failed,
                "dead": str(first[0]),
                "before": before,
                "claims": claims,
                "after": lines(folder, "log"),
                "states": states,
                "left": len(list((folder / "memories" / FOLDER).iterdir())),
                "calls": calls,
                "finished": finished,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
