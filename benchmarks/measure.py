"""What the benchmarks share: calls timed in turns, and the table."""

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.tables import markdown
from vlmem_jax.models import VLM
from vlmem_jax.types import Batch

RUNS = 9
"""Runs behind each median."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: a median of `values`, and the goal that it must keep."""

    what: str
    values: list[float]
    goal: float | None
    at_most: bool
    unit: str = "x"
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        if self.goal is None:
            return True
        return bool(self.median <= self.goal if self.at_most else self.median >= self.goal)

    def cells(self) -> list[str]:
        """A row of the table."""
        spread = f"{min(self.values):.3g} to {max(self.values):.3g}" if len(self.values) > 1 else ""
        goal = f"at {'most' if self.at_most else 'least'} {self.goal:g} {self.unit}" if self.goal is not None else ""
        goal = goal if self.holds else f"**missed:** {goal}"
        return [self.what, f"{self.median:.3g} {self.unit}".strip(), spread, goal.strip()]


COLUMNS = ["measured", "median", "range", "goal"]


def in_turns(*calls: Callable[[], object], runs: int = RUNS) -> np.ndarray:
    """Seconds [runs, calls] of calls that take turns, so that a change in the machine's speed meets all of them."""
    return np.array([[_seconds(call) for call in calls] for _ in range(runs)])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Traces every `jax.lax.scan` as a plain Python loop would be: the same code without scanned layers."""
    scan = jax.lax.scan
    jax.lax.scan = lambda *args, **options: scan(*args, **options | {"unroll": True})
    try:
        yield
    finally:
        jax.lax.scan = scan


def packed_batch(vlm: VLM, rows: int, tokens: int, tiles: int) -> Batch:
    """Rows that are full: one sample each, its first tokens are the visual tokens of its tiles."""
    memory, size = tiles * vlm.tokens_per_tile, vlm.config.vision.image_size
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vlm.config.decoder.vocab, (rows, tokens), dtype=np.int32)
    every_row = functools.partial(np.broadcast_to, shape=(rows, tokens))
    index = np.arange(tokens, dtype=np.int32)
    return Batch.of(
        tokens_BT=ids,
        targets_BT=np.roll(ids, -1, axis=1),
        weights_BT=np.ones((rows, tokens), np.float32),
        positions_BT=every_row(index),
        segments_BT=np.ones((rows, tokens), np.int32),
        visual_index_BT=every_row(np.where(index < memory, index, -1)),
        pixels_BISSc=rng.integers(0, 256, (rows, tiles, size, size, 3), dtype=np.uint8),
        positions_BM=np.broadcast_to(np.arange(memory, dtype=np.int32), (rows, memory)),
        segments_BM=np.ones((rows, memory), np.int32),
    )


def report(rows: list[Row], path: Path | None) -> None:
    """Prints the table, and writes it to a JSON file where one is named."""
    print(markdown(COLUMNS, (row.cells() for row in rows)))
    if path is not None:
        listed = [{**dataclasses.asdict(row), "median": row.median, "holds": row.holds} for row in rows]
        path.write_text(json.dumps(listed, indent=1) + "\n")


def command(
    description: str | None,
    items: Mapping[str, Callable[..., list[Row]]],
    toy: Mapping[str, Mapping[str, Any]],
    arguments: list[str] | None,
) -> None:
    """Measures what the command line names, prints the table, and says on stderr what is going on. `toy`: sizes at
    which each item runs in seconds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=items, default=list(items), metavar="NAME", help=", ".join(items))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that everything runs")
    args = parser.parse_args(arguments)
    rows = []
    for name in args.only:
        measured = items[name](**toy[name] if args.toy else {})
        for row in measured:
            line = f"{name}: {row.what} {row.median:.3g} {row.unit} ({row.note})"
            print(line, file=sys.stderr, flush=True)
        rows += measured
    report(rows, args.json)
