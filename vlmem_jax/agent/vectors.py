"""Vectors of nodes, searched exactly."""

import dataclasses
import functools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlmem_jax.agent.segments import Span


class Hit(NamedTuple):
    """What a search found."""

    number: int
    """Of the node, or of the row."""
    score: float


def as_stored(x_ND: np.ndarray) -> Float[np.ndarray, "N D"]:
    """Vectors as a store gives them back: rounded to fp16. Whoever compares vectors before they are stored compares
    these, or else decides otherwise after it was stopped. Raises ValueError for vectors that are longer than 1."""
    with np.errstate(over="ignore"):
        x_ND = np.atleast_2d(np.asarray(x_ND)).astype(np.float16).astype(np.float32)
    longest = np.linalg.norm(x_ND, axis=1).max(initial=0.0)
    if not longest < 1.01:
        raise ValueError(f"vectors must be of length 1, or 0 for what says nothing; got one of length {longest:.3g}")
    return x_ND


def nearest(x_ND: Float[np.ndarray, "N D"], query_D: np.ndarray, most: int) -> list[Hit]:
    """The rows whose product with a query is largest, at most so many, best first, equal ones in their order.

    Products are sums in fp32, a row at a time: equal rows are equal wherever they stand, which they are not in a
    product of matrices, and no threads wait for each other where other work is going on.
    """
    few = min(most, len(x_ND))
    if few <= 0:
        return []
    scores_N = np.vecdot(x_ND, np.asarray(query_D, np.float32))
    bound = np.partition(scores_N, len(x_ND) - few)[len(x_ND) - few]
    chosen = np.flatnonzero(scores_N >= bound)
    order = np.argsort(-scores_N[chosen], kind="stable")[:few]
    return [Hit(int(n), float(scores_N[n])) for n in chosen[order]]


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Those of the nodes of a layer, in order of their numbers; a node may have several."""

    x_ND: Float[np.ndarray, "N D"]
    numbers_N: Int[np.ndarray, "N"]
    start_N: Float[np.ndarray, "N"]
    end_N: Float[np.ndarray, "N"]
    """When the nodes are, in seconds; NaN where they have no time."""

    @functools.cached_property
    def _each(self) -> int:
        """Vectors of a node, at most."""
        return int(np.unique(self.numbers_N, return_counts=True)[1].max(initial=1))

    def search(
        self, query_D: np.ndarray, most: int, within: Span | None = None, among: Collection[int] | None = None
    ) -> list[Hit]:
        """Nodes by the best of their vectors; those wholly within a stretch of time, and of some numbers alone.

        Raises ValueError for a query of another width.
        """
        check_width(self.x_ND, query_D)
        is_wanted_N = np.ones(len(self.x_ND), bool)
        if within is not None:
            is_wanted_N &= (self.start_N >= within.start) & (self.end_N <= within.end)
        if among is not None:
            is_wanted_N &= np.isin(self.numbers_N, list(among))
        rows = np.flatnonzero(is_wanted_N)
        is_whole = len(rows) == len(self.x_ND)
        x_ND, numbers_N = (self.x_ND, self.numbers_N) if is_whole else (self.x_ND[rows], self.numbers_N[rows])
        best: dict[int, float] = {}
        for row, score in nearest(x_ND, query_D, most * self._each):
            best.setdefault(int(numbers_N[row]), score)
        return [Hit(*item) for item in list(best.items())[:most]]


def check_width(x_ND: np.ndarray, query_D: np.ndarray) -> None:
    """Raises ValueError if a query is not as wide as what is searched."""
    if len(x_ND) and np.shape(query_D) != x_ND.shape[1:]:
        raise ValueError(
            f"the memory holds vectors of {x_ND.shape[1]} numbers, and the query has {np.shape(query_D)}; search with "
            "the embedder that the memory was made with"
        )
