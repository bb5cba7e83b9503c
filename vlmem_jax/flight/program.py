"""What a compiled program does: its collectives, how often each runs, and the compiler's estimate of its cycles.

Read from the text of the optimised HLO. A loop's body counts as often as the loop runs.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_SHAPE = re.compile(r"\b(pred|bf16|c64|f\d+\w*|[su]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ROW = re.compile(r"^(\d+) ([\"{].*)$")


_MOVES = {"copy", "copy-start", "transpose", "pad", "slice", "dynamic-slice", "concatenate", "reverse"}
"""What makes an array out of another without computing."""
_STILL = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def operation(self) -> str:
        """Path of the call in the traced function that it comes from, if the compiler remembers it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @functools.cached_property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    @functools.cached_property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """(element type, sizes) of the result, or of each part of a tuple."""
        return [(kind, tuple(int(n) for n in sizes.split(",") if n)) for kind, sizes in _SHAPE.findall(self.type)]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices, as often as a step runs it."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes over which devices exchange; empty where they are no axes of the mesh."""
    shape: tuple[int, ...]
    """Of the whole array on a device: what is gathered, reduced, or about to be scattered, before any padding."""
    bytes: int
    """Of that array, or of the part of it that a permutation passes on."""
    devices: int
    """That take part in one exchange."""
    times: int
    source: str
    """Where in the model it comes from, as the compiler remembers it."""


class HloProgram:
    """The computations of a compiled program."""

    def __init__(self, text: str):
        lines: dict[str, list[str]] = {}
        entry, name = None, None
        self._sources: dict[str, dict[int, str]] = {}
        for line in text.splitlines():
            if line in _TABLES:
                name, table = None, self._sources.setdefault(line, {})
            elif row := _ROW.match(line):
                table[int(row[1])] = row[2]
            elif begin := _COMPUTATION.match(line):
                name = begin[2]
                lines[name] = []
                entry = name if begin[1] else entry
            elif line == "}":
                name = None
            elif name is not None and line.startswith("  ") and " = " in line:
                lines[name].append(line)
            elif name is not None and lines[name]:  # an attribute may contain line breaks
                lines[name][-1] += line
        self.computations = {name: [_instruction(line) for line in found] for name, found in lines.items()}
        if entry is None:
            raise ValueError("this is no HLO module: it has no ENTRY computation")
        self.times = self._count(entry)

    def __iter__(self) -> Iterator[tuple[Instruction, int]]:
        """Every instruction that is reached, and how often it runs."""
        for name, times in self.times.items():
            for instruction in self.computations[name]:
                yield instruction, times

    def source(self, instruction: Instruction) -> str:
        """`file:line` that an instruction comes from: the innermost of this package, if there is one; else empty."""
        return next(self.sources(instruction), "")

    def sources(self, instruction: Instruction) -> Iterator[str]:
        """`file:line` of the calls of this package that an instruction comes from, the innermost first."""
        found = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        frame = int(found[1]) if found else 0
        while frame in self._sources.get("StackFrames", {}):
            place, above = _numbers(self._sources["StackFrames"][frame])
            file, _, line, *_ = _numbers(self._sources["FileLocations"][place])
            path = self._sources["FileNames"][file].strip('"')
            ours = re.search(r"(?:vlmem_jax|kernels_pallas)/(?!.*(?:vlmem_jax|kernels_pallas)/).*", path)
            if ours:
                yield f"{ours[0]}:{line}"
            frame = above - 1

    def _count(self, entry: str) -> dict[str, int]:
        times: dict[str, int] = defaultdict(int)

        def visit(name: str, count: int) -> None:
            times[name] += count
            for instruction in self.computations[name]:
                trips = self._trips(instruction) if instruction.opcode == "while" else 1
                branches = _BRANCHES.search(instruction.rest)
                called = _CALLED.findall(instruction.rest)
                called += re.findall(r"[\w.\-]+", branches[1]) if branches else []
                for other in called:
                    if other in self.computations:
                        visit(other, count * trips)

        visit(entry, 1)
        return dict(times)

    def _trips(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition = re.search(r"\bcondition=%?([\w.\-]+)", loop.rest)
        inside = self.computations.get(condition[1], []) if condition else []
        limits = [int(n) for i in inside if i.opcode == "constant" for n in re.findall(r"^\((\d+)\)", i.rest)]
        return max(limits, default=1)

    def cycles(self, counts: Callable[[Instruction], bool] = lambda instruction: True) -> int:
        """The compiler's estimates of what counts, added up; kernels of our own and exposed communication are not in
        them."""
        total = 0
        for instruction, times in self:
            if not counts(instruction):
                continue
            found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            total += times * int(found[1]) if found else 0
        return total

    def copies(self, sizes: Collection[int]) -> int:
        """How often arrays of so many elements, or a good part of one, are made again elsewhere in the large memory, as
        they are, turned round, padded or cut."""
        alone = {name: times for name, times in self.times.items() if name not in self.fused}
        return sum(n * self._copies(i, sizes) for name, n in alone.items() for i in self.computations[name])

    def _copies(self, i: Instruction, sizes: Collection[int]) -> bool:
        opcodes = {inner.opcode for inner in self.inside(i)} if i.opcode == "fusion" else {i.opcode}
        if not opcodes & _MOVES or opcodes - _MOVES - _STILL or "S(1)" in i.type:  # that is in the fast memory
            return False
        arrays = [i, *(self.made[name] for name in i.operands if name in self.made)]
        counts = [max((math.prod(shape) for _, shape in array.shapes), default=0) for array in arrays]
        return any(count in sizes for count in counts) and 2 * counts[0] >= min(sizes)

    @functools.cached_property
    def made(self) -> dict[str, Instruction]:
        """Every instruction by its name."""
        return {i.name: i for instructions in self.computations.values() for i in instructions}

    @functools.cached_property
    def fused(self) -> set[str]:
        """Names of the computations that are the inside of a fusion."""
        return {_CALLED.search(i.rest)[1] for i in self.made.values() if i.opcode == "fusion"}

    def inside(self, fusion: Instruction) -> list[Instruction]:
        """The instructions of a fusion."""
        return self.computations[_CALLED.search(fusion.rest)[1]]

    @functools.cached_property
    def _scatters(self) -> dict[str, tuple[Instruction, Instruction]]:
        """Fusions that add up an array and keep a part of it -> the all-reduce inside, and the array before padding.

        So the compiler writes a reduce-scatter where its rings ask for parts of other sizes than those of the array.
        """
        found = {}
        for fusion in self.made.values():
            called = _CALLED.search(fusion.rest) if fusion.opcode == "fusion" else None
            inside = {i.name: i for i in self.computations.get(called[1], [])} if called else {}
            for part in inside.values():
                total = inside.get(part.operands[0]) if part.opcode == "dynamic-slice" else None
                if total and total.opcode == "all-reduce":
                    array = inside[total.operands[0]]
                    found[fusion.name] = total, inside[array.operands[0]] if array.opcode == "pad" else array
        return found

    @functools.cached_property
    def _inner(self) -> set[str]:
        """Exchanges for which another instruction stands: inside a scatter, or later steps of an asynchronous one."""
        started = {name for i in self.made.values() if '"AsyncCollectiveStart"' in i.rest for name in i.operands}
        steps = {i.name for i in self.made.values() if '"async_collective_fusion_config"' in i.rest}
        return {total.name for total, _ in self._scatters.values()} | steps - started

    def _edge_of(self, instruction: Instruction) -> tuple[int, ...] | None:
        """Shape of the array whose parts, once scattered, a permutation evens out between neighbours."""
        if not instruction.opcode.startswith("collective-permute") or not instruction.operands:
            return None
        source = self.made.get(instruction.operands[0])
        if source and source.opcode == "slice" and source.operands[0] in self._scatters:
            return self._scatters[source.operands[0]][1].shapes[0][1]
        return None

    def collectives(self, mesh: Mapping[str, int]) -> list[Collective]:
        """All exchanges, on a mesh of these axes (in the order in which devices are numbered); alike ones are one."""
        names = _groups_by_axes(mesh)
        found: dict[Collective, int] = defaultdict(int)
        for instruction, times in self:
            between = _between_slices(instruction)
            if between:
                found[between] += times
            kind = instruction.opcode.removesuffix("-start")
            exchange, parts, whole = instruction, instruction.shapes, self._edge_of(instruction)
            if instruction.name in self._scatters:
                kind, (exchange, array) = "reduce-scatter", self._scatters[instruction.name]
                parts = array.shapes
            elif kind not in KINDS or instruction.name in self._inner:
                continue
            elif instruction.opcode.endswith("-start"):  # operands and results
                parts = [max(parts, key=array_bytes)]
            groups = _groups(exchange.rest, math.prod(mesh.values()))
            count = max(len(group) for group in groups)
            if count == 1:  # nothing is exchanged
                continue
            axes = _called(groups, names) if kind != "collective-permute" else _along(groups, mesh)
            for element, shape in parts:
                if instruction.opcode == "reduce-scatter" and shape:
                    shape = (count * shape[0], *shape[1:])
                size = array_bytes((element, shape))
                found[Collective(kind, axes, whole or shape, size, count, 0, instruction.operation)] += times
        return [dataclasses.replace(c, times=times) for c, times in found.items()]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    return Instruction(name.lstrip("%"), kind, opcode, rest[len(opcode) :])


def _between_slices(instruction: Instruction) -> Collective | None:
    """What a chip exchanges with its like in other slices, which hosts carry out; `data` alone goes over slices."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
    if instruction.opcode != "send" or kind is None:
        return None
    taking_part = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', instruction.rest)
    slices = len(_listed(taking_part[1])) if taking_part else 2
    name = kind[1].lower().replace("_", "-")
    part = max(instruction.shapes, key=array_bytes)
    return Collective(name, ("data",), part[1], array_bytes(part), slices, 0, instruction.operation)


def _listed(ids: str) -> list[int]:
    """Of 1,2 or 1:3."""
    ends = [[int(end) for end in part.split(":")] for part in ids.split(",") if part]
    return [n for first, *last in ends for n in range(first, (last or [first])[0] + 1)]


def _numbers(row: str) -> list[int]:
    """Of a row of a table of sources, such as {file_name_id=1 line=24}."""
    return [int(number) for number in re.findall(r"=(\d+)", row)]


def _closing(text: str) -> int:
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def array_bytes(part: tuple[str, tuple[int, ...]]) -> int:
    """Bytes of an array of this element type and shape."""
    element, shape = part
    bits = 8 if element == "pred" else int(re.search(r"\d+", element)[0])
    return -(-math.prod(shape) * bits // 8)


Group = frozenset[int]


def _groups(rest: str, devices: int) -> list[Group]:
    """Devices that exchange with each other."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if pairs:
        return [frozenset(map(int, re.findall(r"\d+", pair))) for pair in re.findall(r"\{?(\d+,\d+)\}?", pairs[1])]
    iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", rest)
    if iota:
        shape = _sizes(iota[1])
        return [frozenset(row) for row in _iota(*iota.groups()[1:]).reshape(shape).tolist()]
    named = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", rest)
    if named:
        mesh, dims, order, chosen = named.groups()
        return _named_groups(mesh, _iota(dims, order) if dims else None, chosen)
    listed = re.search(r"replica_groups=\{(\{.*?\})\}", rest)
    if listed:
        return [frozenset(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    return [frozenset(range(devices))]


_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
"""Devices in an order such as [4,2]T(1,0): counted in that shape, then turned."""


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_sizes(dims))).reshape(_sizes(dims))
    return ids.transpose(_sizes(order)) if order else ids


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _named_groups(mesh: str, devices: np.ndarray | None, chosen: str) -> list[Group]:
    """Groups along `chosen` axes, such as `'a'`, or `'a':(2)4` for the 4 parts of it that follow the outermost 2.

    `devices`: in the order in which the mesh holds them; None: as counted.
    """
    sizes = {name: [int(size)] for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    along = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen):
        if size:
            (whole,) = sizes[name]
            sizes[name] = [int(before), int(size), whole // int(before) // int(size)]
        along.append((name, 1 if size else 0))
    places = [(name, n) for name, parts in sizes.items() for n in range(len(parts))]
    shape = [size for parts in sizes.values() for size in parts]
    ids = (np.arange(math.prod(shape)) if devices is None else devices).reshape(shape)
    moved = np.moveaxis(ids, [places.index(place) for place in along], range(-len(along), 0))
    count = math.prod(sizes[name][n] for name, n in along)
    return [frozenset(row) for row in moved.reshape(-1, count).tolist()]


def _groups_by_axes(mesh: Mapping[str, int]) -> dict[frozenset[Group], tuple[str, ...]]:
    """What the groups are called, for each set of axes."""
    ids, axes = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values())), list(mesh)
    long = [axis for axis in axes if mesh[axis] > 1]
    named = {}
    for count in range(len(long), 0, -1):
        for some in itertools.combinations(long, count):
            moved = np.moveaxis(ids, [axes.index(axis) for axis in some], range(-count, 0))
            rows = moved.reshape(-1, math.prod(mesh[axis] for axis in some)).tolist()
            named[frozenset(map(frozenset, rows))] = some
    return named


def _called(groups: list[Group], names: Mapping[frozenset[Group], tuple[str, ...]]) -> tuple[str, ...]:
    """The axes along which these groups lie; a program of one of several slices names those of its slice alone."""
    found = frozenset(groups)
    return names.get(found) or next((axes for whole, axes in names.items() if found < whole), ())


def _along(pairs: list[Group], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Axes along which any pair differs."""
    shape = tuple(mesh.values())
    ends = [np.array(np.unravel_index(sorted(pair), shape)) for pair in pairs if len(pair) == 2]
    return tuple(axis for n, axis in enumerate(mesh) if any(places[n, 0] != places[n, 1] for places in ends))
