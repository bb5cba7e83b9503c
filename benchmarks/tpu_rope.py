"""Static cycles of the rotation alone, as `rope_dhr` does it and as XLA fuses it, between the projection that makes the
queries of a layer and whoever reads them as [B, T, H*C].

    python -m benchmarks.tpu_static --kernel rope_dhr --json rows.json

XLA's are its own estimate of the program with the rotation, less that of the same without it; those of the kernel are
the bundles of its code, or the time that the memory needs for what it reads and writes, if that is more, and what XLA
estimates around it.
"""

import dataclasses
import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp

from benchmarks import tpu_static
from benchmarks.tables import markdown
from benchmarks.tpu_dump import Program, regions
from kernels_pallas import rope_dhr, rotary
from kernels_pallas.device import PEAKS
from kernels_pallas.lanes import LANES, up
from kernels_pallas.memory_attention.blocks import CORES
from kernels_pallas.rope_dhr.tpu import ROWS
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.nn import rope

TOKENS = {"row": (1, 16384), "chunk": (1, 512), "decode": (64, 1)}
"""Rows, and tokens of each: a packed row, a chunk of a prompt, a decoding step."""


@dataclasses.dataclass(frozen=True)
class RopeCase:
    """The queries of a layer on one chip."""

    name: str
    chip: str
    rotation: str = "rope_dhr"
    """Or "xla", "none"."""
    heads: int = 32

    @property
    def shape(self) -> tuple[int, int]:
        return TOKENS[self.name]


def build(case: RopeCase):
    """(function, abstract arguments)."""
    width = case.heads * LANES
    table = jax.ShapeDtypeStruct((*case.shape, LANES // 2), jnp.float32)

    def run(x, kernel, cos, sin):
        q = (x @ kernel).reshape(*case.shape, -1, LANES)
        if case.rotation == "xla":
            q = rope.rotate(q, (cos, sin))
        if case.rotation == "rope_dhr":
            tables = rotary.Tables(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))
            q = rope_dhr(q, tables, implementation="tpu")
        return q.reshape(*case.shape, -1)

    x, kernel = (jax.ShapeDtypeStruct((*shape, width), jnp.bfloat16) for shape in (case.shape, (width,)))
    return run, (x, kernel, table, table)


@functools.cache
def dumped(case: RopeCase) -> tuple[Program | None, float]:
    """The kernel's code, and XLA's estimate of the rest. Raises: RuntimeError with the compiler's last words."""
    name = "rope_dhr" if case.rotation == "rope_dhr" else None
    program, said = tpu_static.dumped(["benchmarks.tpu_rope"], case, name)
    return program, float(said)


def kernel_cycles(case: RopeCase, program: Program) -> float:
    """Of the kernel, whose blocks pad short rows."""
    batch, tokens = case.shape
    rows = min(ROWS, up(tokens, LANES))
    steps = batch * up(tokens, rows) // rows
    read = steps * rows * LANES * (2 * 2 * case.heads + 2 * 4)  # in and out in bf16, two tables in fp32
    bundles = regions(program)[0].size * steps / (CORES[case.chip] if steps % CORES[case.chip] == 0 else 1)
    return max(bundles, read / PEAKS[case.chip].hbm * tpu_static.CLOCK[case.chip])


def measure(name: str, chip: str) -> dict:
    """A row of --json."""
    cases = {rotation: RopeCase(name, chip, rotation) for rotation in ("none", "xla", "rope_dhr")}
    none, xla = (dumped(cases[rotation])[1] for rotation in ("none", "xla"))
    program, around = dumped(cases["rope_dhr"])
    own = around - none + kernel_cycles(cases["rope_dhr"], program)
    row = {"case": name, "chip": chip, "cycles": round(own), "xla_cycles": round(xla - none)}
    return row | {"projection_cycles": round(none), "kept_jax": own > xla - none}


def rows_of(chips: list[str]) -> list[dict]:
    """Of all cases."""
    found = []
    for chip, name in itertools.product(chips, TOKENS):
        found.append(measure(name, chip))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def table(listed: list[dict]) -> str:
    """Markdown."""
    columns = {"chip": "chip", "case": "case", "rope_dhr": "cycles", "XLA": "xla_cycles"}
    columns |= {"the projection itself": "projection_cycles"}
    return markdown(list(columns), [[row[name] for name in columns.values()] for row in listed])


def main(argument: str) -> None:
    """Compiles a case, whose dumps the caller reads, and prints XLA's estimate."""
    case = RopeCase(**json.loads(argument))
    print(HloProgram(tpu_static.compile_for(case.chip, *build(case)).as_text()).cycles())


if __name__ == "__main__":
    main(sys.argv[1])
