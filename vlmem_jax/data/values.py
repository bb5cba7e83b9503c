"""The values of a data file, whatever its layout: a JSON array, JSONL, pretty-printed JSON, or parquet."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

_BETWEEN = re.compile(r"[\s,]*")


def values(source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """All values of a file, those of its arrays one by one, in order, each with its name: `file:line: value N`, or
    `file: row N` of parquet. Raises ValueError for one that cannot be read."""
    with open(source, "rb") as file:
        head = file.read(4)
    return _rows(source) if head == b"PAR1" else _json(source)


def _json(source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    decoder, place, line, number, inside = json.JSONDecoder(), 0, 1, 0, False
    while True:
        start = _BETWEEN.match(text, place).end()
        line += text.count("\n", place, start)
        place = start
        if place == len(text) and not inside:
            return
        if text[place : place + 1] == "[]"[inside]:
            place, inside = place + 1, not inside
            continue
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}:{line}: a value must be JSON; {str(error).partition(':')[0]}") from error
        number += 1
        yield f"{source}:{line}: value {number}", value
        line += text.count("\n", place, end)
        place = end


def _rows(source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"reading parquet, {source}, needs pyarrow; install vlmem_jax[parquet]") from error
    try:
        with parquet.ParquetFile(source) as file:
            rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{source}: row {number}", row
    except ArrowException as error:
        raise ValueError(f"{source} is damaged: {error}") from error
