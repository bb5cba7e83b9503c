"""What fills a chip's memory, read from the compiler's own buffer assignment."""

import dataclasses
import re

from vlmem_jax.flight.program import HloProgram

_VALUE = re.compile(r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})? @\d+> \(size=(\d+),offset=(\d+)\): (\S+?)(?:\{|$)")
_TEMPORARY = re.compile(r"^allocation \d+: size (\d+), preallocated-temp", re.M)
"""That of the chip's large memory; arrays kept in another, such as VMEM, have a colour before the last word."""


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array that the program keeps while it runs."""

    bytes: int
    type: str
    """Element type and shape on a chip."""
    source: str
    """File and line that made it."""
    operation: str
    """As the compiler names it."""
    for_backward: bool
    """Stacked by a loop of the forward pass for that of the backward pass: an activation kept."""


def buffers(assignment: str, program: HloProgram) -> list[Buffer]:
    """Arrays of the temporary memory that do not share a place, largest first.

    `assignment` is the compiler's text of its buffers; places that are used again for smaller arrays count once.
    """
    made = {i.name: i for instructions in program.computations.values() for i in instructions}
    places: dict[tuple[int, int], list[tuple[str, str]]] = {}
    temporary = False
    for line in assignment.splitlines():
        if line.startswith("allocation "):
            temporary = _TEMPORARY.match(line) is not None
        elif temporary and (value := _VALUE.match(line)):
            name, size, offset, kind = value.groups()
            places.setdefault((int(size), int(offset)), []).append((name, kind))
    taken: list[tuple[int, int]] = []
    found = []
    for (size, offset), values in sorted(places.items(), reverse=True):
        if any(offset < end and begin < offset + size for begin, end in taken):
            continue
        taken.append((offset, offset + size))
        makers = [made[name] for name, _ in values if name in made]
        kept = any(_kept(i.operation) for i in makers)
        maker = max(makers, key=lambda i: (kept and _kept(i.operation), bool(program.source(i))), default=None)
        source, operation = (program.source(maker), maker.operation) if maker else ("", "")
        found.append(Buffer(size, values[0][1], source, operation, kept))
    return found


def temporary_bytes(assignment: str) -> int:
    """Of the memory that the program needs beside its arguments and results."""
    return sum(int(size) for size in _TEMPORARY.findall(assignment))


def _kept(operation: str) -> bool:
    return "jvp(" in operation and "transpose(" not in operation and "dynamic_update_slice" in operation
