"""Scores of VSI-Bench (arXiv 2412.14171, sec. 3) and VSTI-Bench (arXiv 2505.20279): an answer is one word, a letter or
a number, and a number is worth as much as it is near."""

import math
from collections.abc import Mapping

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10).round(2)
"""A number counts a tenth for each that its relative error leaves."""
NUMERICAL = (
    *("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation"),
    *("camera_obj_abs_dist", "camera_displacement", "camera_obj_dist_change"),
)
CHOICES = (
    *("object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order"),
    *("obj_obj_relative_pos", "camera_obj_rel_dist", "camera_movement_direction"),
)
"""Tasks of VSI-Bench, and of VSTI-Bench: what counts as one in their tables."""
MERGED = {
    f"{task}_{variant}": task
    for task, variants in {
        "object_rel_direction": ("easy", "medium", "hard"),
        "obj_obj_relative_pos": ("nf", "ud", "lr"),
        "camera_obj_rel_dist": ("v1", "v2", "v3"),
    }.items()
    for variant in variants
}
"""Question types whose means are averaged into that of one task."""
KINDS = dict.fromkeys(NUMERICAL, "number") | {
    kind: "choice" for kind in (*CHOICES, *MERGED) if kind not in MERGED.values()
}
"""What each question type asks for."""


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
    """The numbers of a benchmark's table, of the mean score of each question type: tasks, and the means of all, of
    those with numbers and of those with choices; `unmerged` is the mean of types as they are, which VSTI-Bench's own
    scorer gives. Types that were not asked are left out."""
    parts: dict[str, list[float]] = {}
    for kind, value in accuracy.items():
        parts.setdefault(MERGED.get(kind, kind), []).append(value)
    tasks = {task: float(np.mean(values)) for task, values in parts.items()}
    groups = {"overall": (*NUMERICAL, *CHOICES), "numerical": NUMERICAL, "multiple_choice": CHOICES}
    means = {name: [tasks[task] for task in group if task in tasks] for name, group in groups.items()}
    means["unmerged"] = list(accuracy.values())
    return tasks | {name: float(np.mean(values)) for name, values in means.items() if values}
