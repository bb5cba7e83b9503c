"""Tables in Markdown: printed by each benchmark, found again in a README beside the command that makes them."""

import dataclasses
import re
from collections.abc import Iterable

LABELS = ("", "chip", "direction", "slots", "measured", "kernel")
"""Columns that say what a row is; the others hold figures."""
COMMAND = re.compile(r"`python -m (benchmarks\.\w+)([^`]*)`")


def markdown(columns: list[str], rows: Iterable[Iterable[object]]) -> str:
    """The table, a line a row."""
    head, *lines = (f"| {' | '.join(map(str, line))} |" for line in (columns, *rows))
    return "\n".join([head, "|---" * len(columns) + "|", *lines])


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as it stands in a text, its first line being number `start` of it."""

    columns: list[str]
    rows: list[list[str]]
    start: int
    end: int
    module: str | None
    """The module that makes it, with `arguments`; None where the paragraph before names none of the benchmarks."""
    arguments: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join(("python -m", self.module or "", *self.arguments))

    def by_label(self) -> dict[str, dict[str, str]]:
        """Cells of each row by column; a row goes by the cells that say what it is."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {", ".join(row[name] for name in self.columns if name in LABELS): row for row in rows}


def tables(text: str) -> list[Table]:
    """All tables of a text, in order."""
    lines = text.splitlines()
    found, paragraph, number = [], "", 0
    while number < len(lines):
        if not lines[number].startswith("|"):
            fresh = number == 0 or not lines[number - 1].strip() and lines[number].strip()
            paragraph = lines[number] if fresh else f"{paragraph} {lines[number]}"
            number += 1
            continue
        start = number
        while number < len(lines) and lines[number].startswith("|"):
            number += 1
        columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:number])
        command = COMMAND.search(paragraph)
        module, arguments = (command[1], tuple(command[2].split())) if command else (None, ())
        found.append(Table(columns, rows, start, number, module, arguments))
        paragraph = ""
    return found


def moved(old: Table, new: Table) -> list[str]:
    """The differences, a line a row: a median that left the old one's range, or another figure that is not equal."""
    before, after, said = old.by_label(), new.by_label(), []
    for label in before | after:
        if label not in before or label not in after:
            said.append(f"{label}: {'is not made any more' if label in before else 'is new'}")
            continue
        was, now = before[label], after[label]
        if "median" in was:
            spread = numbers(was["range"] or was["median"])
            changes = [] if min(spread) <= numbers(now["median"])[0] <= max(spread) else ["median"]
        else:
            changes = [name for name in was | now if was.get(name) != now.get(name)]
        if changes:
            cells = (f"{name} {was.get(name, '-')} -> {now.get(name, '-')}" for name in changes)
            said.append(f"{label}: {', '.join(cells)}")
    return said


def numbers(cell: str) -> list[float]:
    """The numbers in a cell; its unit is left out."""
    return [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", cell)]
