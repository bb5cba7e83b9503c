"""The numbers that a benchmark is reported by, from the lines of an evaluation."""

from collections.abc import Sequence
from typing import Any

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
