"""Vectors of many memories, to be searched together: whatever has these methods, and the exact one."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int

from vlmem_jax.agent.store import Layer
from vlmem_jax.agent.vectors import Vectors


class Found(NamedTuple):
    """A node that a search found."""

    video: str
    number: int
    score: float


class Indexed(NamedTuple):
    """What an index takes of a memory."""

    video: str
    mark: str
    """Another one if the memory has changed."""
    layers: Mapping[Layer, Vectors]


class VectorIndex(Protocol):
    """Vectors of many memories. It can be made again from them, and holds nothing else."""

    def marks(self) -> dict[str, str]:
        """The videos that it holds, with the marks they came with."""
        ...

    def put(self, memories: Sequence[Indexed]) -> None:
        """Takes memories as they are now; each is there as a whole, or not at all."""
        ...

    def remove(self, videos: Collection[str]) -> None:
        """Forgets memories, which may not be there."""
        ...

    def search(
        self, layer: Layer, query_D: np.ndarray, most: int, videos: Collection[str] | None = None
    ) -> list[Found]:
        """The nodes nearest to a query, of all videos or some, best first; equal ones by video and number."""
        ...


class _Stacked(NamedTuple):
    """A layer of all videos. Its vectors have the numbers of rows of what follows."""

    vectors: Vectors
    videos: list[str]
    video_N: Int[np.ndarray, "N"]
    number_N: Int[np.ndarray, "N"]


class ExactIndex:
    """Vectors in this process, which compares all of them: up to some 200,000 of 1,024 numbers, 4 bytes each."""

    def __init__(self):
        self._held: dict[str, Indexed] = {}
        self._stacked: dict[Layer, _Stacked] = {}

    def marks(self) -> dict[str, str]:
        """See `VectorIndex`."""
        return {video: held.mark for video, held in self._held.items()}

    def put(self, memories: Sequence[Indexed]) -> None:
        """See `VectorIndex`."""
        self._held |= {one.video: one for one in memories}
        self._stacked.clear()

    def remove(self, videos: Collection[str]) -> None:
        """See `VectorIndex`."""
        for video in videos:
            self._held.pop(video, None)
        self._stacked.clear()

    def search(
        self, layer: Layer, query_D: np.ndarray, most: int, videos: Collection[str] | None = None
    ) -> list[Found]:
        """See `VectorIndex`. Raises ValueError for a query of another width."""
        if layer not in self._stacked:
            self._stacked[layer] = self._stack(layer)
        stacked, among = self._stacked[layer], None
        if videos is not None:
            wanted = [n for n, video in enumerate(stacked.videos) if video in set(videos)]
            among = np.flatnonzero(np.isin(stacked.video_N, wanted)).tolist()
        hits = stacked.vectors.search(query_D, most, among=among)
        return [
            Found(stacked.videos[stacked.video_N[hit.number]], int(stacked.number_N[hit.number]), hit.score)
            for hit in hits
        ]

    def _stack(self, layer: Layer) -> _Stacked:
        """All videos in one matrix, of which each keeps its part."""
        held = {video: one.layers[layer] for video, one in sorted(self._held.items()) if len(one.layers[layer].x_ND)}
        videos, parts = list(held), list(held.values())
        empty = np.zeros((0, 0), np.float32)
        x_ND = np.concatenate([part.x_ND for part in parts]) if parts else empty
        row, first, rows_N, video_N, number_N = 0, 0, [], [], []
        for n, (video, part) in enumerate(held.items()):
            numbers, places_N = np.unique(part.numbers_N, return_inverse=True)
            rows_N.append(first + places_N)
            video_N.append(np.full(len(numbers), n))
            number_N.append(numbers)
            mine = dataclasses.replace(part, x_ND=x_ND[row : row + len(part.x_ND)])
            self._held[video] = self._held[video]._replace(layers={**self._held[video].layers, layer: mine})
            row, first = row + len(part.x_ND), first + len(numbers)
        whole = [np.concatenate(some) if some else np.zeros(0, np.int64) for some in (rows_N, video_N, number_N)]
        times = [np.full(len(x_ND), np.nan)] * 2
        return _Stacked(Vectors(x_ND, whole[0], *times), videos, whole[1], whole[2])
