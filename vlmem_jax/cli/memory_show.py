"""How memories are told on a terminal: times, sizes, tables, answers."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmem_jax.agent.answers import Answer, Visit


def clock(seconds: float) -> str:
    """`00:12:30`, and tenths where they are not 0."""
    tenths = round(10 * seconds)
    whole, part = divmod(tenths, 10)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}" + (f".{part}" if part else "")


def seconds(text: str) -> float:
    """Of `00:12:30`, `12:30` or `750`. For argparse."""
    found = re.fullmatch(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"a time is HH:MM:SS or seconds, got {text!r}")
    hours, minutes, rest = found.groups(default="0")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def told(text: str, most: int) -> str:
    """A text in one line without control characters, which a model or a file wrote."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines whose columns stand below each other."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[n]) for row in rows if n < len(row)) for n in range(max(map(len, rows), default=0))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]


def size(folder: Path) -> str:
    """Of all files below a folder."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"


def answer_lines(answer: Answer, trace: bool) -> list[str]:
    """An answer, when the video shows it, and perhaps how it was found."""
    said = told(answer.text, 1000)
    lines = [said if answer.in_memory else f"the memory does not tell; the likeliest answer: {said}"]
    spans = ", ".join(f"{clock(span.start)}-{clock(span.end)}" for span in answer.evidence)
    where = f"shown at {spans}" if spans else "shown nowhere"
    sure = f", entropy {answer.belief.entropy:.2f} nats" if answer.belief.probabilities else ""
    lines.append(f"  {where} (stage {answer.stage}{sure}; {answer.calls} calls, {answer.images} images)")
    return lines + aligned(map(_visit, answer.trace)) if trace else lines


def _visit(visit: Visit) -> list[str]:
    belief = visit.belief
    probabilities = " ".join(f"{label} {p:.2f}" for label, p in belief.probabilities.items())
    sure = f"entropy {belief.entropy:.2f}" if probabilities else ""
    enough = "" if visit.enough is None else f"enough {visit.enough:.2f}"
    spans = ", ".join(f"{n} {clock(span.start)}-{clock(span.end)}"
                      for n, span in zip(visit.taken, visit.spans, strict=False))  # fmt: skip
    says = probabilities or told(visit.text, 40)
    return [f"  {visit.stage}", says, sure, enough, "sure" if visit.is_sure else "goes on", spans]
