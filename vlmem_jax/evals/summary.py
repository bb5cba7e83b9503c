"""Numbers of an evaluation, from its lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Line = dict[str, Any]
"""Of one prompt, as in samples.jsonl: what was answered, or the error for which it was skipped."""

TENTHS = 10
"""Bins of the histogram of positions."""


def summarise(lines: Sequence[Line], kinds: Sequence[str] = ()) -> dict[str, Any]:
    """Numbers of all prompts and, in `sources`, of each source. `kinds` are those of a memory that speaks.

    `accuracy` is the mean score, `mean_of_sources` that of their accuracies; `seconds` are wall time of a batch over
    its prompts. `invocation` is there where the memory speaks: the share of answers with at least one memory of a kind,
    how many there are in an answer, and in which tenths of the chosen tokens they were called for.
    """
    sources: dict[str, list[Line]] = {}
    for line in lines:
        if "output" in line:
            sources.setdefault(line["source"], []).append(line)
    answered = [line for source in sources.values() for line in source]
    each = {source: _numbers(sources[source], kinds) for source in sorted(sources)}
    return {
        **_numbers(answered, kinds),
        "mean_of_sources": _mean([numbers["accuracy"] for numbers in each.values()]),
        "skipped": len(lines) - len(answered),
        "peak_memory_gb": max((line["peak_memory_gb"] for line in answered), default=None),
        "sources": each,
    }


def _numbers(lines: Sequence[Line], kinds: Sequence[str] = ()) -> dict[str, Any]:
    scores = [line["score"] for line in lines]
    warm = [line for line in lines if not line["compiled"]]
    numbers = {
        "samples": len(lines),
        "scored": sum(score is not None for score in scores),
        "accuracy": _mean(scores),
        "tokens": _mean([float(line["tokens"]) for line in lines]),
        "cut_off": _mean([float(not line["stopped"]) for line in lines]),
        "seconds": _mean([line["seconds"] for line in warm or lines]),
        "seconds_with_compilation": not warm,
    }
    if lines and "memories" in lines[0]:
        numbers["invocation"] = _invocation(lines, kinds)
    return numbers


def _invocation(lines: Sequence[Line], kinds: Sequence[str]) -> dict[str, Any]:
    ratio, positions = {}, {}
    for kind in kinds:
        places = [[place / line["tokens"] for k, place in line["memories"] if k == kind] for line in lines]
        ratio[kind] = _mean([float(bool(of_line)) for of_line in places])
        tenths = np.array([place for of_line in places for place in of_line]) * TENTHS
        positions[kind] = np.bincount(tenths.astype(int), minlength=TENTHS).tolist()
    return {
        "ratio": ratio,
        "per_sample": _mean([float(len(line["memories"])) for line in lines]),
        "positions": positions,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def table(summary: dict[str, Any]) -> str:
    """A line for each source and one for all, ready to print."""
    other = summary.get("without_memory")
    kinds = list(summary["invocation"]["ratio"]) if "invocation" in summary else []
    header = ["source", "samples", "accuracy", *(f"{kind} calls" for kind in kinds), "s/sample"]
    rows = [header + ["without memory", "s/sample"] * bool(other)]
    for source in (*summary["sources"], None):
        of = _of(summary, source)
        calls = [_percent(of["invocation"]["ratio"][kind]) for kind in kinds]
        row = [source or "all", str(of["samples"]), _percent(of["accuracy"]), *calls, _seconds(of)]
        if other:
            without = _of(other, source)
            row += [_percent(without["accuracy"]), _seconds(without)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    if any(cell.endswith("*") for row in rows for cell in row[1:]):
        lines.append("* with compiling: no batch was of a shape seen before")
    return "\n".join(lines)


def _of(summary: dict[str, Any], source: str | None) -> dict[str, Any]:
    """Numbers of a source, or of all."""
    return summary if source is None else summary["sources"].get(source) or _numbers([])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(numbers: dict[str, Any]) -> str:
    mark = "*" if numbers["seconds_with_compilation"] else ""
    return "-" if numbers["seconds"] is None else f"{numbers['seconds']:.3f}{mark}"
