"""An index of more vectors than are compared one by one: LanceDB, on a disk or in a bucket (s3://, gs://)."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from vlmem_jax.agent.index import Found, Indexed
from vlmem_jax.agent.store import Layer, check_id

MARKS = "videos"
FEWEST = 50_000
"""Rows below which comparing all is as fast."""


class LanceIndex:
    """A table a layer, and one of the videos that are in them as a whole; see `VectorIndex`.

    Memories are best put many at a time: each time makes files of its own. Raises ModuleNotFoundError without the
    extra `lancedb`.
    """

    def __init__(self, where: str):
        import lancedb

        self._db = lancedb.connect(where)
        self._there = set(self._db.list_tables(limit=100).tables)

    def marks(self) -> dict[str, str]:
        """See `VectorIndex`."""
        if MARKS not in self._there:
            return {}
        rows = self._db.open_table(MARKS).to_arrow().to_pydict()
        return dict(zip(rows["video"], rows["mark"], strict=True))

    def put(self, memories: Sequence[Indexed]) -> None:
        """See `VectorIndex`: what is interrupted has no mark, and is put again."""
        import pyarrow as pa

        self.remove([one.video for one in memories])
        for layer in dict.fromkeys(layer for one in memories for layer in one.layers):
            parts = [(one.video, one.layers[layer]) for one in memories if layer in one.layers]
            parts = [(video, part) for video, part in parts if len(part.x_ND)]
            if not parts:
                continue
            x_ND = np.concatenate([part.x_ND for _, part in parts])
            columns = {
                "video": pa.array([video for video, part in parts for _ in range(len(part.x_ND))]),
                "number": pa.array(np.concatenate([part.numbers_N for _, part in parts])),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), x_ND.shape[1]),
            }
            self._add(layer, pa.table(columns))
        marks = {"video": [one.video for one in memories], "mark": [one.mark for one in memories]}
        self._add(MARKS, pa.table(marks))

    def _add(self, table: str, rows: Any) -> None:
        if not len(rows):
            return
        if table in self._there:
            self._db.open_table(table).add(rows)
        else:
            self._db.create_table(table, data=rows)
            self._there.add(table)

    def remove(self, videos: Collection[str]) -> None:
        """See `VectorIndex`; marks go first."""
        for table in sorted(self._there, key=lambda name: name != MARKS) if videos else ():
            self._db.open_table(table).delete(_among(videos))

    def search(
        self, layer: Layer, query_D: np.ndarray, most: int, videos: Collection[str] | None = None
    ) -> list[Found]:
        """See `VectorIndex`; once `build` has made an index, not all that is nearest is found. Raises ValueError for a
        query of another width."""
        if layer not in self._there or most <= 0 or (videos is not None and not videos):
            return []
        table = self._db.open_table(layer)
        width = table.schema.field("vector").type.list_size
        if np.shape(query_D) != (width,):
            raise ValueError(f"the index holds vectors of {width} numbers, and the query has {np.shape(query_D)}")
        rows = 2 * most
        while True:
            query = table.search(np.asarray(query_D, np.float32)).distance_type("dot").refine_factor(10).limit(rows)
            if videos is not None:
                query = query.where(_among(videos), prefilter=True)
            found = query.select(["video", "number", "_distance"]).to_arrow().to_pydict()
            best: dict[tuple[str, int], float] = {}
            for video, number, distance in zip(found["video"], found["number"], found["_distance"], strict=True):
                best[video, number] = max(1 - distance, best.get((video, number), -np.inf))
            if len(best) > most or len(found["video"]) < rows:  # else nodes of many vectors hide others
                order = sorted(best.items(), key=lambda item: (-item[1], item[0]))
                return [Found(*node, score) for node, score in order[:most]]
            rows *= 2

    def build(self) -> None:
        """Joins files, and makes an index of each layer that is large enough for one; what is put later is compared
        one by one until the next time."""
        for name in sorted(self._there):
            table = self._db.open_table(name)
            table.optimize()
            if name != MARKS and table.count_rows() >= FEWEST:
                table.create_scalar_index("video")
                table.create_index(metric="dot", index_type="IVF_PQ")


def _among(videos: Collection[str]) -> str:
    """In SQL, in which ids need no quoting."""
    return f"video IN ({', '.join(repr(check_id(video)) for video in sorted(videos))})"
