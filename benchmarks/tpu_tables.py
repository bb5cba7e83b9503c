"""The tables of kernels in the READMEs, counted again for TPUs that are not there; see `tpu_static`.

    python -m benchmarks.tpu_tables v5e         # the kernels on a chip, beside splash attention; about half an hour
    python -m benchmarks.tpu_tables compared    # other blocks

One table a call: the figures repeat to the bundle with the same jax and libtpu.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/tpu_tables.py`

from benchmarks import tpu_static
from benchmarks.tables import markdown
from benchmarks.tpu_kernels import SPLASH_BLOCKS, Case, flash_case, splash_case
from benchmarks.tpu_static import Row, percent
from kernels_pallas.lanes import LANES, up
from vlmem_jax.nn import attention
from vlmem_jax.nn.attention import AttentionConfig

FORWARD = [
    dict(slots=256),
    dict(slots=1792),
    dict(slots=3328),
    dict(),
    dict(segments=True),
    dict(rotation="positions"),
    dict(slots=12288),
    dict(kv_heads=8),
    dict(kv_heads=4),
    dict(head_dim=64),
    dict(head_dim=64, rotation="none"),
]
BACKWARD = [dict(), dict(kv_heads=8), dict(kv_heads=4), dict(head_dim=64), dict(head_dim=64, rotation="none")]
ALSO = {
    "v5e": {
        "forward": [dict(head_dim=80), dict(dtype="float32")],
        "backward": [dict(slots=1792), dict(slots=2500), dict(segments=True), dict(slots=12288), dict(dtype="float32")],
    },
    "v5p": {"backward": [dict(segments=True)]},
    "v6e": {},
}
"""On this chip alone."""


def cases(chip: str) -> list[Case]:
    """The rows of a chip's table."""
    every = {"forward": FORWARD, "backward": BACKWARD}
    return [Case(chip=chip, direction=name, **changes)
            for name, listed in every.items() for changes in [*listed, *ALSO[chip].get(name, [])]]  # fmt: skip


def compares(case: Case) -> bool:
    """True where splash attention has blocks for the same work."""
    return (case.direction, case.size) in SPLASH_BLOCKS


class Measured:
    """Rows of cases, several compiled at a time."""

    def __init__(self, wanted: Iterable[Case], jobs: int):
        wanted = list(dict.fromkeys(wanted))
        self.rows: dict[Case, Row] = {}
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for row in pool.map(tpu_static.measure, wanted):
                self.rows[row.case] = row
                c = row.case
                line = f"{len(self.rows)} of {len(wanted)}: {c.kernel} {c.chip} {c.direction} {c.size} {c.chosen}"
                print(f"{line}: corr {percent(row.utilisation)} %", file=sys.stderr, flush=True)

    def __getitem__(self, case: Case) -> Row:
        return self.rows[case]


def blocks(case: Case) -> str:
    """Sizes of the blocks, as the tables show them."""
    return ", ".join(map(str, case.chosen))


def speed(chip: str, jobs: int) -> str:
    """The kernels on one chip, beside splash attention."""
    listed = cases(chip)
    rows = Measured([*listed, *(splash_case(case) for case in listed if compares(case))], jobs)
    columns = ["direction", "slots", "blocks", "raw %", "corr %", "splash raw, corr %", "its blocks", "bundles"]
    columns += ["spill stores", "VMEM MB", "HBM / least"]
    lines = []
    for case in listed:
        row, other = rows[case], rows[splash_case(case)] if compares(case) else None
        cells = [case.direction, case.size, blocks(case), percent(row.raw), percent(row.utilisation)]
        cells += [f"{percent(other.raw)}, {percent(other.utilisation)}", blocks(other.case)] if other else ["-", "-"]
        lines.append([*cells, row.bundles, row.spills, row.vmem, row.moved])
    return markdown(columns, lines)


def units(jobs: int) -> str:
    """Load of the units of a chip."""
    shown = {"MXU": "MXU", "VSTORE": "VSTORE", "VSTORE:SPILL": "of it spills", "VPOP": "VPOP", "VALU": "VALU"}
    shown |= {"EUP": "EUP", "VLOAD": "VLOAD", "VLOAD:FILL": "of it fills", "XLU": "XLU"}
    sizes = {("forward", size) for size in ("256", "1792", "4096", "4096, segments", "4096, positions", "12288")}
    sizes |= {("backward", size) for size in ("4096", "4096, segments")}
    listed = [case for chip in ALSO for case in cases(chip) if (case.direction, case.size) in sizes]
    rows = Measured(listed, jobs)
    lines = ([c.chip, c.direction, c.size, *(f"{100 * rows[c].load[unit]:.0f}" for unit in shown)] for c in listed)
    return markdown(["chip", "direction", "slots", *shown.values()], lines)


def decode(jobs: int) -> str:
    """One to 16 queries of each head over turned slots."""
    listed = [Case(chip=chip, direction="decode", queries=16) for chip in ALSO]
    rows = Measured(listed, jobs)
    lines = ([c.chip, c.size, rows[c].bundles, round(rows[c].hbm_cycles), rows[c].moved] for c in listed)
    return markdown(["chip", "slots", "bundles", "cycles to read K and V", "HBM / least"], lines)


def summary(jobs: int) -> str:
    """The kernels in four lines."""
    listed = {
        "memory attention forward, rotation included, 4096 slots": dict(),
        "the same, packed rows": dict(segments=True),
        "the same, 256 slots": dict(slots=256),
        "backward, 4096 slots": dict(direction="backward"),
    }
    pairs = {(name, chip): Case(chip=chip, **changes) for name, changes in listed.items() for chip in ("v5e", "v5p")}
    rows = Measured([c for case in pairs.values() for c in (case, splash_case(case))], jobs)

    def both(case: Case) -> list[str]:
        return [percent(rows[c].utilisation) for c in (case, splash_case(case))]

    lines = ([name, *both(pairs[name, "v5e"]), *both(pairs[name, "v5p"])] for name in listed)
    return markdown(["", "v5e", "v5e, splash", "v5p", "v5p, splash"], lines)


BANKS = [dict(slots=11776), dict(slots=11776, batch=2), dict(slots=5888), dict(slots=11776, heads=18, head_dim=64)]
"""Parts of 16 frames of 729 patches, filled up to whole blocks, one and two at a time, and one of 8 frames; then with
heads of half the width. 729 queries are 768 rows."""


def banks(jobs: int) -> str:
    """Frames that read banks of frames."""
    plain = dict(queries=768, heads=9, rotation="none", valid=True)
    given = [(chip, "forward", bank) for chip in ("v5e", "v5p") for bank in BANKS]
    given += [("v5e", "backward", bank) for bank in BANKS[:1]]
    listed = [Case(**plain | bank | dict(chip=chip, direction=direction, kv_heads=bank.get("heads", 9)))
              for chip, direction, bank in given]  # fmt: skip
    rows = Measured(listed, jobs)

    def line(c: Case) -> list:
        row = rows[c]
        cells = [c.chip, c.direction, f"{c.batch} x {c.slots}, {c.heads} heads of {c.head_dim}", blocks(c)]
        return [*cells, percent(row.raw), percent(row.utilisation), row.bundles, row.spills, row.vmem, row.moved]

    columns = ["chip", "direction", "slots", "blocks", "raw %", "corr %", "bundles", "spill stores", "VMEM MB"]
    return markdown([*columns, "HBM / least"], map(line, listed))


WINDOW = 64
"""Patches of the largest window of Qwen's towers."""


def towers(jobs: int) -> str:
    """Attention of the vision towers as they call it on v5e: how much of the pairs that the kernel's blocks compute is
    padding, or masked."""
    run = attention.KERNEL_KEYS - 2 * WINDOW
    kernel_length = functools.partial(attention.kernel_length, AttentionConfig("tpu_interpret"))
    tile, frame = kernel_length(1025), kernel_length(729)
    plain = functools.partial(Case, rotation="none")
    listed = {
        "InternViT, a tile of 1025": (1025**2, plain(queries=tile, slots=tile, head_dim=64, valid=True)),
        "SigLIP, a frame of 729": (729**2, plain(queries=frame, slots=frame, head_dim=72, valid=True)),
        "Qwen, windows of 64": (
            3072 * WINDOW,
            plain(batch=3072 // run, queries=run, slots=attention.KERNEL_KEYS, head_dim=80, segments=True),
        ),
    }
    rows, lines = Measured([case for _, case in listed.values()], jobs), []
    for name, (useful, case) in listed.items():
        computed = case.batch * up(case.queries, case.chosen[0]) * up(case.slots, LANES)
        size = f"{case.batch} x {case.queries} x {case.slots}"
        wasted, lanes = percent(1 - useful / computed), percent(case.head_dim * case.together / LANES)
        lines.append([case.chip, name, size, case.head_dim, blocks(case), wasted, lanes, round(rows[case].cycles)])
    columns = ["chip", "tower", "rows x queries x slots", "head dim", "blocks", "wasted pairs %", "lanes in use %"]
    return markdown([*columns, "cycles"], lines)


COMPARED = {
    "memory_attention": {
        ("v5e", "forward", "256"): "2048 512 8; 2048 512 4; 2048 1024 2; 2048 512 2",
        ("v5e", "forward", "1792"): "2048 512 256; 2048 256 512; 2048 512 512; 2048 256 1024",
        ("v5e", "forward", "3328"): "2048 512 256; 2048 512 512; 2048 256 1024",
        ("v5e", "forward", "4096, positions"): "2048 512 256; 2048 512 512; 2048 256 1024",
        ("v5e", "forward", "4096"): "2048 512 256; 2048 256 512; 2048 512 512; 2048 256 256",
        ("v5e", "forward", "4096, segments"): "2048 512 256; 2048 256 1024; 2048 256 512; 2048 512 1024",
        ("v5e", "forward", "12288"): "1024 512 256; 512 512 512; 1024 512 512; 512 256 512",
        ("v5e", "backward", "1792"): "2048 1792 512; 2048 896 512",
        ("v5e", "backward", "4096"): "2048 2048 512; 2048 1024 512; 2048 1024 1024; 2048 512 512",
        ("v5p", "forward", "256"): "2048 512 4; 2048 256 4",
        ("v5p", "forward", "1792"): "2048 512 256; 2048 512 512",
        ("v5p", "forward", "3328"): "2048 512 256; 2048 512 512",
        ("v5p", "forward", "4096, positions"): "2048 512 512; 2048 512 256",
        ("v5p", "forward", "4096"): "2048 512 512; 2048 512 256; 2048 256 512",
        ("v5p", "forward", "4096, segments"): "2048 256 512; 2048 512 256; 2048 512 512",
        ("v5p", "forward", "12288"): "512 512 512; 1024 512 512; 512 512 256",
        ("v5p", "backward", "4096"): "2048 2048 512; 2048 1024 512",
        ("v6e", "forward", "1792"): "2048 1024 512; 2048 512 512; 2048 512 896; 2048 512 256",
        ("v6e", "forward", "3328"): "2048 512 512; 2048 512 256",
        ("v6e", "forward", "4096"): "2048 512 512; 2048 512 256; 2048 256 1024; 1024 512 512",
        ("v6e", "forward", "4096, segments"): "2048 512 256; 2048 512 512; 2048 256 512",
        ("v6e", "forward", "12288"): "1024 512 512; 512 512 512; 512 512 256",
        ("v6e", "backward", "4096"): "2048 2048 512; 2048 1024 512; 2048 1024 256",
    },
    "splash": {
        ("v5e", "forward", "4096"): "1024 4096 256; 1024 2048 512",
        ("v5e", "forward", "4096, segments"): "512 4096 512; 1024 4096 256",
        ("v5e", "backward", "4096"): "1024 2048 512; 1024 1024 1024; 1024 1024 512; 2048 1024 512",
        ("v5p", "forward", "4096, segments"): "1024 4096 256; 512 4096 512",
        ("v6e", "forward", "4096"): "1024 4096 512; 1024 2048 512; 1024 4096 256; 1024 1024 512",
    },
    "flash": {
        ("v5e", "forward", "256"): "1024 256 256",
        ("v5e", "forward", "4096"): "1024 1024 512; 1024 1024 1024; 512 1024 512",
        ("v5p", "forward", "4096"): "1024 1024 1024",
        ("v6e", "forward", "4096"): "1024 1024 1024",
    },
}
"""Blocks compared, the best four of those tried, by kernel, chip, direction and slots."""


def compared(kernels: list[str], jobs: int) -> str:
    """Other blocks of a kernel."""
    tried = {}
    for kernel in kernels:
        for (chip, direction, size), sizes in COMPARED[kernel].items():
            case = next(c for c in cases(chip) if (c.direction, c.size) == (direction, size))
            case = {"splash": splash_case, "flash": flash_case}.get(kernel, lambda case: case)(case)
            label = (chip if kernel == "memory_attention" else f"{kernel} {chip}", direction, size)
            each = (tuple(map(int, blocks.split())) for blocks in sizes.split("; "))
            tried[label] = [case if case.chosen == b else dataclasses.replace(case, blocks=b) for b in each]
    rows = Measured([case for listed in tried.values() for case in listed], jobs)
    lines = []
    for label, listed in tried.items():
        best = sorted((rows[case] for case in listed), key=lambda row: -row.utilisation)
        said = (f"{' '.join(map(str, row.case.chosen))}: {percent(row.utilisation)}" for row in best)
        lines.append([*label, "; ".join(said)])
    return markdown(["chip", "direction", "slots", "candidates, corr %"], lines)


TABLES: dict[str, Callable[[int], str]] = {
    **{chip: functools.partial(speed, chip) for chip in ALSO},
    "units": units,
    "decode": decode,
    "banks": banks,
    "towers": towers,
    "compared": functools.partial(compared, ["memory_attention"]),
    "others": functools.partial(compared, ["flash", "splash"]),
    "summary": summary,
}


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, and says on stderr what is going on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compiled at a time")
    args = parser.parse_args(arguments)
    print(TABLES[args.table](args.jobs))


if __name__ == "__main__":
    main()
