"""Scores of VSI-Bench and VSTI-Bench (arXiv 2412.14171, sec. 3): an answer is one word, a letter or a number, and a
number is worth as much as it is near."""

import math
from collections.abc import Mapping

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
"""A number counts a tenth for each that its relative error leaves."""
NUMERICAL = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
CHOICES = ("object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order")
"""Tasks of VSI-Bench: what counts as one in its table."""
MERGED = {f"object_rel_direction_{level}": "object_rel_direction" for level in ("easy", "medium", "hard")}
"""Question types whose means are averaged into that of one task."""


def first_word(output: str) -> str:
    """What is judged of an output: up to the first space, without full stops at its end."""
    return output.split(" ")[0].rstrip(".").strip()


def choice(output: str, reference: str) -> float:
    """1 for the letter of the reference, in any case."""
    return float(first_word(output).lower() == reference.lower())


def number(output: str, reference: str) -> float:
    """Mean relative accuracy: the share of THRESHOLDS t for which the relative error is at most 1 - t; 0 for no number.

    Of a reference of 0, 1 where the number is 0.
    """
    try:
        said, true = float(first_word(output)), float(reference)
    except ValueError:
        return 0.0
    if true == 0:
        return float(said == 0)
    error = abs(said - true) / true
    return 0.0 if math.isnan(error) else float((error <= 1 - THRESHOLDS).mean())


def benchmark(accuracy: Mapping[str, float]) -> dict[str, float]:
    """The numbers of VSI-Bench's table, of the mean score of each question type: tasks, and the means of all, of those
    with numbers and of those with choices. Types that were not asked are left out."""
    parts: dict[str, list[float]] = {}
    for kind, value in accuracy.items():
        parts.setdefault(MERGED.get(kind, kind), []).append(value)
    tasks = {task: float(np.mean(values)) for task, values in parts.items()}
    groups = {"overall": (*NUMERICAL, *CHOICES), "numerical": NUMERICAL, "multiple_choice": CHOICES}
    means = {name: [tasks[task] for task in group if task in tasks] for name, group in groups.items()}
    return tasks | {name: float(np.mean(values)) for name, values in means.items() if values}
