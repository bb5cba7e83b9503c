"""Reads the machine code that the TPU compiler dumps: cycles, load of each unit and spills, region by region.

A bundle takes at least one cycle. Bundles between a loop's header and its back edge run once a trip, those that a
branch jumps over as often as its predicate lets them. Two figures come out: bundles as scheduled, and cycles
when each matmul holds its unit for as long as the peak rate implies (v5e: 16 cycles for 16 rows of bf16). The
scheduler places bf16 matmuls 12 cycles apart, so that the first figure alone can exceed the peak.
"""

import dataclasses
import re
from pathlib import Path

UNITS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")
DELAY_SLOTS = 4
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:([A-Z]{2}))? *: *((?:> *)*)\{", re.M)
_BRANCH = re.compile(r"sbr\.rel (?:\((!?%p\w+)\) )?target = \$region(\d+)")
_MATMUL = re.compile(r"vmatmul\.(\w+)[\w.]*\.mxu(\d)")
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass
class Bundle:
    depth: int
    matmuls: tuple[tuple[int, float], ...]
    """(matrix unit, time that it is held, in units of a bf16 matmul) of each matmul."""
    branch: str | None
    starts: frozenset[str]


@dataclasses.dataclass(frozen=True)
class Span:
    """Bundles [start, end) that run together: a loop's body, or what a branch jumps over."""

    kind: str
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def holds(self, other: "Span") -> bool:
        """Whether the other stands in it and is not all of it."""
        return self.start <= other.start and other.end <= self.end and other.size < self.size


@dataclasses.dataclass
class Program:
    """A kernel's bundles, the units that each uses, and its loops and conditionals."""

    bundles: list[Bundle]
    units: list[tuple[int, ...]]
    capacity: tuple[int, ...]
    spans: list[Span]

    def weights(self, runs: dict[Span, float]) -> list[float]:
        """How often each bundle runs; a span that `runs` does not name runs once each time it is reached."""
        weights = [1.0] * len(self.bundles)
        for span, times in runs.items():
            for i in range(span.start, span.end):
                weights[i] *= times
        return weights

    def cycles(self, weights: list[float], matmul_cycles: float = 16) -> tuple[float, float]:
        """(bundles, cycles with bf16 matmuls held for their full time), each bundle as often as its weight."""
        raw = corrected = 0.0
        free: dict[int, float] = {}
        now = 0.0
        previous = None
        for bundle, weight in zip(self.bundles, weights, strict=True):
            if weight != previous:  # another region: nothing is carried over
                free, previous = {}, weight
            issue = max([now, *(free.get(unit, 0.0) for unit, _ in bundle.matmuls)])
            for unit, held in bundle.matmuls:
                free[unit] = issue + held * matmul_cycles
            raw += weight
            corrected += weight * (issue + 1 - now)
            now = issue + 1
        return raw, corrected

    def load(self, weights: list[float]) -> dict[str, float]:
        """Share of its slots that each unit fills, and (SPILLS) the spill stores themselves."""
        total = sum(weights)
        used = [sum(w * units[i] for w, units in zip(weights, self.units, strict=True)) for i in range(len(UNITS))]
        return {name: u / (c * total) for name, u, c in zip(UNITS, used, self.capacity, strict=True)}

    def spills(self, weights: list[float]) -> int:
        """Spill stores in the code that runs."""
        column = UNITS.index("VSTORE:SPILL")
        return sum(units[column] for units, w in zip(self.units, weights, strict=True) if w > 0)


def regions(program: Program) -> tuple[Span, list[Span]]:
    """The body of a grid step, and the conditional parts in it that no other holds."""
    body = max((s for s in program.spans if s.kind == "loop"), key=lambda s: s.size)
    inner = [s for s in program.spans if body.start <= s.start and s.end <= body.end and 40 < s.size < 0.98 * body.size]
    tops = outermost(inner)
    if len(tops) == 1 and tops[0].size > 0.9 * body.size:  # the compiler's own branch around the whole step
        tops = outermost([s for s in inner if s.size < tops[0].size])
    return body, tops


def outermost(spans: list[Span]) -> list[Span]:
    """Those that no other holds."""
    one_each = list({(s.start, s.end): s for s in spans}.values())
    return [s for s in one_each if not any(o is not s and o.start <= s.start and s.end <= o.end for o in one_each)]


def read(folder: Path, name: str) -> Program:
    """The program of kernel `name` among a compiler's dumps.

    Raises: FileNotFoundError when it was not compiled there, or its dump was not written.
    """
    code = sorted(folder.glob(f"*-{name}*-final_bundles.txt"))
    code = [path for path in code if "schedule-analysis" not in path.name]
    if not code:
        raise FileNotFoundError(f"no final_bundles of a kernel named {name} in {folder}")
    bundles = _bundles(code[-1].read_text())
    units, capacity = _units(folder, code[-1].name, len(bundles))
    return Program(bundles, units, capacity, _spans(bundles))


def _bundles(text: str) -> list[Bundle]:
    matches = list(_BUNDLE.finditer(text))
    ends = [m.start() for m in matches[1:]] + [len(text)]
    bundles = []
    for match, end in zip(matches, ends, strict=True):
        body = text[match.end() : end]
        matmuls = tuple((int(unit), 0.5 if kind == "f32" else 1.0) for kind, unit in _MATMUL.findall(body))
        branch = _BRANCH.search(body)
        bundles.append(Bundle(match[3].count(">"), matmuls, branch and branch[2], frozenset(_STARTS.findall(body))))
    return bundles


def _units(folder: Path, code_name: str, count: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
    stem = re.sub(r"-\d+-final_bundles\.txt$", "", code_name)
    path = next(folder.glob(f"{stem}-*-final_hlo-static-per-bundle-utilization.txt"))
    rows = [tuple(map(int, line.split())) for line in path.read_text().splitlines() if re.fullmatch(r"[ \d]+", line)]
    capacity, *units = rows
    units += [(0,) * len(UNITS)] * (count - len(units))
    return units[:count], capacity


def _spans(bundles: list[Bundle]) -> list[Span]:
    where = {region: i for i, bundle in enumerate(bundles) for region in bundle.starts}
    spans = []
    for i, bundle in enumerate(bundles):
        if bundle.branch is None or bundle.branch not in where:
            continue
        target, after = where[bundle.branch], i + 1 + DELAY_SLOTS
        spans.append(Span("loop", target, after) if target <= i else Span("branch", after, target))
    return sorted((s for s in spans if s.size > 0), key=lambda s: (s.start, -s.size))
