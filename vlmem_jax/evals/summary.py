"""Numbers of an evaluation, from its lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmem_jax.evals.benchmarks import LENGTHS, length_class, reported

Line = dict[str, Any]
"""Of one prompt, as in samples.jsonl: what was answered, or the error for which it was skipped."""

TENTHS = 10
"""Bins of the histogram of positions."""


def summarise(
    lines: Sequence[Line], kinds: Sequence[str] = (), benchmark: str = "", mode: str = "offline"
) -> dict[str, Any]:
    """Numbers of all prompts and, in `sources`, of each source. `kinds` are those of a memory that speaks.

    `accuracy` is the mean score, `mean_of_sources` that of their accuracies; `seconds` are wall time, from one
    answer to the next. `invocation` is there where the memory speaks: the share of answers with at least one memory of
    a kind, how many there are in an answer, and in which tenths of the chosen tokens they were called for.

    Where videos were shown there are the fewest and the most `frames` taken for a prompt, the `mode`, offline (all are
    shown) or stream (those that a memory keeps are), and, in `lengths`, numbers of each class of videos. `benchmark`
    names one of `data.benchmarks` for what it is reported by, of all prompts and of each class.
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
        **_videos(answered, benchmark, mode),
        **_reported(answered, benchmark),
    }


def _videos(lines: Sequence[Line], benchmark: str, mode: str) -> dict[str, Any]:
    """What is known of the videos that were shown, if any were."""
    frames = [line["frames"] for line in lines if "frames" in line]
    if not frames:
        return {}
    lengths: dict[str, list[Line]] = {name: [] for name in LENGTHS}
    for line in lines:
        if line.get("length"):
            lengths[length_class(line["length"])].append(line)
    found = {name: _numbers(of) | _reported(of, benchmark) for name, of in lengths.items() if of}
    return {"mode": mode, "frames": [min(frames), max(frames)], "lengths": found}


def _reported(lines: Sequence[Line], benchmark: str) -> dict[str, Any]:
    return {"benchmark": reported(benchmark, lines)} if benchmark else {}


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
    """A line for each source and one for all, ready to print; below them what a benchmark is reported by, numbers of
    each class of videos, and what else they depend on."""
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
    lines = _aligned(rows)
    if any(cell.endswith("*") for row in rows for cell in row[1:]):
        lines.append("* with compiling: no batch was of a shape seen before")
    lengths = summary.get("lengths", {})
    if lengths or "benchmark" in summary:
        lines += ["", *_aligned(_by_length({"all": summary, **lengths}))]
    if "frames" in summary:
        lines.append(_circumstances(summary))
    if summary.get("left_out"):
        lines.append(summary["left_out"])
    return "\n".join(lines)


def _by_length(columns: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each number of a benchmark, else for accuracy, and a column for each class of videos."""
    reported = [of.get("benchmark", {"accuracy": of["accuracy"]}) for of in columns.values()]
    rows = [["benchmark" if "benchmark" in columns["all"] else "length", *columns]]
    rows += [[name, *(_percent(of.get(name)) for of in reported)] for name in reported[0]]
    return [*rows, ["samples", *(str(of["samples"]) for of in columns.values())]]


def _circumstances(summary: dict[str, Any]) -> str:
    least, most = summary["frames"]
    frames = f"{least}" if least == most else f"{least} to {most}"
    versions = [f"vlmem_jax {summary['version']}"] if "version" in summary else []
    parameters = [f"parameters {summary['parameters'][:8]}"] if "parameters" in summary else []
    return ", ".join([f"{frames} frames a question", summary["mode"], *versions, *parameters])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def _of(summary: dict[str, Any], source: str | None) -> dict[str, Any]:
    """Numbers of a source, or of all."""
    return summary if source is None else summary["sources"].get(source) or _numbers([])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _seconds(numbers: dict[str, Any]) -> str:
    mark = "*" if numbers["seconds_with_compilation"] else ""
    return "-" if numbers["seconds"] is None else f"{numbers['seconds']:.3f}{mark}"
