"""What memories on disk cost: to be searched, and to be written. Times, of this machine.

    python -m benchmarks.store                    # some minutes
    python -m benchmarks.store --only library --json rows.json
    python -m benchmarks.store --toy              # does everything run? The figures mean nothing

`index` needs the extra `lancedb`. Nothing else should be running.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/store.py`

from benchmarks.measure import RUNS, Row, command
from vlmem_jax.agent.calls import Call, Reply
from vlmem_jax.agent.index import ExactIndex, Indexed
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.nodes import Segment
from vlmem_jax.agent.store import open_store, video_id
from vlmem_jax.agent.vectors import Vectors, as_stored
from vlmem_jax.agent.writing import write_store

MILLISECONDS = 1e3


def write(folder: Path, rng: np.random.Generator, nodes: int, width: int) -> None:
    """A closed memory of segments with a sentence each."""
    vectors_ND = unit(rng.normal(size=(nodes, width)))
    with write_store(folder, {"video": folder.name}) as store, store.transaction() as batch:
        for n, vector_D in enumerate(vectors_ND):
            batch.put(Segment(n, 10.0 * n, 10.0 * n + 10, "somebody washes a cup at the sink " * 5), vector_D[None])
        batch.mark("closed")


def unit(x_ND: np.ndarray) -> np.ndarray:
    """Vectors of length 1, as a store holds them."""
    return as_stored(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True))


def milliseconds(call: Callable[[], object], runs: int, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Of each run, by a clock."""
    found = []
    for _ in range(runs):
        start = clock()
        call()
        found.append(MILLISECONDS * (clock() - start))
    return found


def one_video(nodes=500, width=1024, runs=5 * RUNS) -> list[Row]:
    """A question to the memory of an hour of video: opened for it, and open already."""
    rng = np.random.default_rng(0)
    query_D = rng.normal(size=width)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), rng, nodes, width)

        def first() -> None:
            with open_store(name) as store:
                store.search("segment", query_D)

        once = milliseconds(first, runs)
        with open_store(name) as store:
            store.search("segment", query_D)
            then = milliseconds(lambda: store.search("segment", query_D), runs)
    how = f"{nodes} nodes of {width} numbers, best 10"
    return [
        Row("search of one video, opened for it", once, 20, True, "ms", how),
        Row("the same, open already", then, 2, True, "ms", how),
    ]


def library(videos=200, nodes=500, width=1024, runs=3 * RUNS) -> list[Row]:
    """A question to many memories, all vectors compared."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        many = Library(name)
        for n in range(videos):
            write(many.folder(video_id("video", f"{n:016x}")), rng, nodes, width)
        reading = milliseconds(many.refresh, 1)
        query_D = rng.normal(size=width)
        many.search("segment", query_D)
        searching = milliseconds(lambda: many.search("segment", query_D), runs, time.process_time)
    how = f"{videos} memories of {nodes} nodes of {width} numbers"
    return [
        Row("reading the vectors of a library, once", reading, None, True, "ms", how),
        Row("search of a library, all vectors compared, CPU time", searching, 60, True, "ms", how),
    ]


def journal(calls=500, runs=RUNS) -> list[Row]:
    """A reply that is kept, in a transaction of its own."""
    reply = Reply("somebody washes a cup at the sink " * 20)
    with tempfile.TemporaryDirectory() as name, write_store(name, {}) as store:
        numbers = iter(range(calls * runs))

        def keep() -> None:
            for _ in range(calls):
                with store.transaction() as batch:
                    batch.reply(Call("caption", (f"call {next(numbers)}",)), reply)

        used = [spent / calls for spent in milliseconds(keep, runs, time.process_time)]
    return [Row("a call in the journal, CPU time", used, None, True, "ms", f"{calls} calls, a transaction each")]


def index(nodes=1_000_000, width=256, videos=1000, topics=5000, queries=50) -> list[Row]:
    """More vectors than are compared one by one, around so many topics, as texts are, by LanceDB."""
    from vlmem_jax.agent.lance import LanceIndex

    rng = np.random.default_rng(0)
    topics_KD = rng.normal(size=(topics, width))
    each = nodes // videos
    exact = ExactIndex()
    with tempfile.TemporaryDirectory() as name:
        lance = LanceIndex(name)

        def near() -> np.ndarray:
            return unit(topics_KD[rng.integers(0, topics, each)] + rng.normal(size=(each, width)))

        def fill() -> None:
            for first in range(0, videos, 250):
                made = [Vectors(near(), np.arange(each), *np.zeros((2, each))) for _ in range(min(250, videos - first))]
                some = [
                    Indexed(video_id("video", f"{first + n:016x}"), "", {"segment": one}) for n, one in enumerate(made)
                ]
                exact.put(some)
                lance.put(some)

        fill()
        building = milliseconds(lance.build, 1)
        recalls, times = [], []
        for query_D in near()[:queries]:
            wanted = exact.search("segment", query_D, 10)
            found = []
            times += milliseconds(lambda query_D=query_D, found=found: found.extend(
                lance.search("segment", query_D, 10)), 1)  # fmt: skip
            recalls.append(len({hit[:2] for hit in wanted} & {hit[:2] for hit in found}) / 10)
    how = f"{nodes:,} nodes of {width} numbers around {topics:,} topics, LanceDB"
    return [
        Row("building the index of a large library", [building[0] / MILLISECONDS], None, True, "s", how),
        Row("search by the index", times, 150, True, "ms", how),
        Row("of the exact 10 best, found by the index", [float(np.mean(recalls))], 0.95, False, "", how),
    ]


ITEMS = {"one_video": one_video, "library": library, "journal": journal, "index": index}
TOY = {
    "one_video": dict(nodes=5, width=8, runs=2),
    "library": dict(videos=2, nodes=5, width=8, runs=2),
    "journal": dict(calls=2, runs=2),
    "index": dict(nodes=400, width=8, videos=4, topics=10, queries=2),
}
"""Sizes at which each item runs in seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    command(__doc__, ITEMS, TOY, arguments)


if __name__ == "__main__":
    main()
