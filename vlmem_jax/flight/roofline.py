"""How long a program should take, told before there is machine code: its products, and what goes through memory.

Copies that run beside products are left out, as is what stays in the chip's fast memory. Both sums stand one after the
other, since what the compiler lets overlap makes up for what costs more than this. On training steps of CoMemo-2B
(v5e:4x4) and CoMemo-9B (v5e:16x16, v5p:4x4x4) the time is within 8 % of that of the compiler's estimates of cycles; of
small models, prefill and decoding, whose instructions wait for other things, it is a bound from below.
"""

import math
import re
from collections.abc import Callable, Iterator

from kernels_pallas.device import Peak
from vlmem_jax.flight.program import HloProgram, Instruction, array_bytes

PRODUCTS = 0.97
"""The share of the peak that the compiler's estimates give large products."""
_ARRAY = re.compile(r"\b(pred|bf16|c64|f\d+\w*|[su]\d+)\[([\d,]*)\](?:\{([^}]*)\})?")
_STILL = {
    "parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "domain", "custom-call",
}  # fmt: skip
"""Instructions that move nothing, or whose time is counted elsewhere."""
_BESIDE = re.compile(r"all-|reduce-scatter|collective-|ragged-|send|recv|.*-(start|done|update)$")
"""Exchanges, and copies beside other work."""


def seconds(program: HloProgram, peak: Peak, counts: Callable[[Instruction], bool] = lambda instruction: True) -> float:
    """Time on a chip of those instructions of a program that count, without attention kernels and exchanges."""
    roofline, fused = _Roofline(program), program.fused
    total = 0.0
    for name, times in program.times.items():
        for i in program.computations[name] if name not in fused else ():
            if i.opcode not in _STILL and not _BESIDE.match(i.opcode) and counts(i):
                total += times * (roofline.flops(i) / (PRODUCTS * peak.flops) + roofline.moved(i) / peak.hbm)
    return total


class _Roofline:
    def __init__(self, program: HloProgram):
        self.program = program

    def flops(self, i: Instruction) -> int:
        """FLOPs of the products in an instruction."""
        if i.opcode == "fusion":
            return sum(map(self.flops, self.program.inside(i)))
        return _product_flops(i, *(self._shape(name) for name in i.operands[:2])) if i.opcode in _PRODUCTS else 0

    def moved(self, i: Instruction) -> int:
        """Bytes that an instruction reads from the large memory and writes there."""
        if i.opcode == "dynamic-slice":
            return 2 * _large(i.type)
        if i.opcode == "dynamic-update-slice":
            return 2 * _large(self.program.made[i.operands[1]].type)
        if i.opcode == "fusion":
            return self._fusion(i)
        return _large(i.type) + sum(_large(self.program.made[name].type) for name in i.operands)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.program.made[name].shapes[0][1]

    def _fusion(self, i: Instruction) -> int:
        """Bytes that a fusion moves: slices of what is sliced, and updates of what is updated in place."""
        inside = {x.name: x for x in self.program.inside(i)}
        total, root = 0, list(inside.values())[-1]
        for x in inside.values():
            if x.opcode != "parameter":
                continue
            whole = _large(self.program.made[i.operands[_number(x)]].type)
            uses = list(self._uses(x.name, inside))
            if whole and uses and all(place == 0 and user.opcode in _PARTS for user, place in uses):
                parts = (_all(user.type) for user, _ in uses if user.opcode != "dynamic-update-slice")
                whole = min(whole, sum(parts))
            total += whole
        outs = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for out, (size, large) in zip(outs, _arrays(i.type), strict=False):
            while out.opcode in ("bitcast", "copy") and out.operands[0] in inside:
                out = inside[out.operands[0]]
            if out.opcode == "dynamic-update-slice" and out.operands[1] in inside:
                size = _all(inside[out.operands[1]].type)
            total += size * large
        return total

    def _uses(self, name: str, inside: dict[str, Instruction]) -> Iterator[tuple[Instruction, int]]:
        """(user, place among its operands) of a value in a fusion, through changes of shape and fusions within it."""
        for user in inside.values():
            for place, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode == "bitcast":
                    yield from self._uses(user.name, inside)
                elif user.opcode == "fusion":
                    within = {x.name: x for x in self.program.inside(user)}
                    (given,) = (x for x in within.values() if x.opcode == "parameter" and _number(x) == place)
                    yield from self._uses(given.name, within)
                else:
                    yield user, place


def _number(parameter: Instruction) -> int:
    """The place of a fusion's parameter among the operands."""
    return int(re.match(r"\((\d+)\)", parameter.rest)[1])


_PRODUCTS = ("dot", "convolution")
_PARTS = ("dynamic-slice", "gather", "dynamic-update-slice")


def _arrays(kind: str) -> Iterator[tuple[int, bool]]:
    """(bytes, whether it lies in the chip's large memory) of each array of a type."""
    for element, sizes, layout in _ARRAY.findall(kind):
        shape = tuple(int(n) for n in sizes.split(",") if n)
        yield array_bytes((element, shape)), "S(1)" not in layout


def _large(kind: str) -> int:
    return sum(size for size, large in _arrays(kind) if large)


def _all(kind: str) -> int:
    return sum(size for size, _ in _arrays(kind))


def _product_flops(i: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> int:
    """FLOPs of a dot, or of a convolution, for which the pairs of input and window that exist count."""
    out = i.shapes[0][1]
    if i.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[1]
        return 2 * math.prod(out) * math.prod(lhs[int(n)] for n in contracted.split(",") if n)
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
    window = re.search(r"window=\{([^}]*)\}", i.rest)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for n in range(len(left) - 2):

        def of(key: str, default: str, n: int = n) -> int:
            return int(settings[key].split("x")[n].split("_")[0] if key in settings else default)

        stride, low, apart, spread = of("stride", "1"), of("pad", "0"), of("rhs_dilate", "1"), of("lhs_dilate", "1")
        outs, taps, ins = out[result.index(str(n))], rhs[right.index(str(n))], lhs[left.index(str(n))]
        places = (o * stride - low + tap * apart for o in range(outs) for tap in range(taps))
        pairs *= sum(at % spread == 0 and 0 <= at // spread < ins for at in places)
    return 2 * pairs * out[result.index("b")] * out[result.index("f")] * rhs[right.index("i")]
