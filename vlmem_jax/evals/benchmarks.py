"""The numbers that a benchmark is reported by, from the lines of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmem_jax.data.benchmarks import BENCHMARKS
from vlmem_jax.scoring import vsi

LENGTHS = ("under 1 min", "1 to 2 min", "over 2 min")
"""Classes of videos by their length."""


def reported(benchmark: str, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By name, in the order of its table: `vsi.benchmark`, or exact match. Answers without a score do not count."""
    scores: dict[str, list[float]] = {}
    for line in lines:
        if line["score"] is not None:
            scores.setdefault(line["source"], []).append(line["score"])
    if BENCHMARKS[benchmark].metric == "vsi":
        return vsi.benchmark({kind: float(np.mean(of)) for kind, of in sorted(scores.items())})
    return {"exact match": float(np.mean(sum(scores.values(), [])))} if scores else {}


def length_class(seconds: float) -> str:
    """The one of LENGTHS that a video falls into."""
    return LENGTHS[(seconds >= 60) + (seconds > 120)]


# --- long videos ------------------------------------------------------------------------------------------------------

GENERATED = ("sub_scene", "summary")
"""Tasks of MLVU (arXiv 2406.04264) whose answers are texts: they are no part of its M-Avg."""


class Tally(NamedTuple):
    """How many questions were answered right."""

    right: float
    total: int

    @property
    def accuracy(self) -> float:
        """Of no questions, 0."""
        return self.right / self.total if self.total else 0.0


def tallied(lines: Sequence[Mapping[str, Any]], by: str = "") -> dict[str, Tally]:
    """By what stands in a field of the lines, each group where it came first; without a field, all under one name.
    Unlike in `reported`, an answer that failed, without a score, counts as wrong."""
    groups: dict[str, list[float]] = {}
    for line in lines:
        groups.setdefault(str(line.get(by, "")), []).append(float(line.get("score") or 0))
    return {name: Tally(sum(scores), len(scores)) for name, scores in groups.items()}


def mean_of_groups(tallies: Mapping[str, Tally], without: Sequence[str] = ()) -> float:
    """The mean of accuracies, whatever the sizes of groups: overall, of Video-MME's three lengths (arXiv 2405.21075,
    table 4), and M-Avg, of MLVU's tasks but those GENERATED."""
    found = [tally.accuracy for name, tally in tallies.items() if name not in without]
    return float(np.mean(found)) if found else 0.0
