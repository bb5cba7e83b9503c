"""Static speed of the kernels on TPUs that are not there: compiles for v5e, v5p and v6e and counts the cycles.

    python -m benchmarks.tpu_static                        # side by side with splash and flash attention
    python -m benchmarks.tpu_static --chips v5e --slots 4096 --directions forward backward --json rows.json
    python -m benchmarks.tpu_static --search --chips v5e --slots 4096  # block sizes, best first
    python -m benchmarks.tpu_static --kernel causal_attention --case one four  # packed rows, see `tpu_causal`

Figures are a model: stalls on memory and instruction fetch are not in them. Two are given: as scheduled (raw) and with
each matmul holding its unit for its full time (corr); see `tpu_dump`.
"""

import argparse
import dataclasses
import fnmatch
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/tpu_static.py`

from benchmarks.tables import markdown
from benchmarks.tpu_dump import UNITS, Program, read
from benchmarks.tpu_kernels import Case, build, flash_case, runs, splash_case
from kernels_pallas.device import PEAKS

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
MXU_FLOPS = {"v5e": 4 * 128 * 128 * 2, "v5p": 4 * 128 * 128 * 2, "v6e": 2 * 256 * 256 * 2 * 2}
"""Of one core in one cycle. v6e: its two units take two rows a cycle, as XLA's 4096 matmul (0.30M cycles) shows."""
MATMUL_CYCLES = {"v5e": 16, "v5p": 16, "v6e": 8}
"""That 16 rows of bf16, or 8 of fp32 in half the time, hold a matrix unit."""
CLOCK = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Row:
    """What the compiler's dumps say of one case."""

    case: Case
    bundles: int
    cycles: float
    ideal: float
    spills: int
    load: dict[str, float]
    vmem_bytes: int
    hbm_bytes: int | None
    """What blocks move; None where the data decide it."""

    @property
    def hbm_cycles(self) -> float:
        """That the memory needs for each of q, k, v, o once; a kernel with fewer bundles waits for it."""
        return self.case.minimum_bytes / PEAKS[self.case.chip].hbm * CLOCK[self.case.chip]

    @property
    def raw(self) -> float:
        return self.ideal / self.bundles

    @property
    def utilisation(self) -> float:
        """MXU utilisation of the whole operation, corrected."""
        return self.ideal / self.cycles

    @property
    def vmem(self) -> int:
        """MB of the blocks."""
        return round(self.vmem_bytes / 2**20)

    @property
    def moved(self) -> str:
        """Bytes that the blocks move over HBM, over the least."""
        return "-" if self.hbm_bytes is None else f"{self.hbm_bytes / self.case.minimum_bytes:.2f}"


@functools.cache
def measure(case: Case) -> Row:
    """Compiles in a process of its own, since the compiler reads its flags once.

    Raises: RuntimeError with the compiler's last words.
    """
    program, said = dumped(["benchmarks.tpu_static", "--worker"], case, case.name)
    return evaluate(case, program, json.loads(said))


def dumped(module: list[str], case, name: str | None) -> tuple[Program | None, str]:
    """The code of kernel `name`, if one is named, of a case that `python -m` of these words compiles, and the last line
    that it prints.

    Raises: RuntimeError with the compiler's last words.
    """
    with tempfile.TemporaryDirectory(prefix="tpu_static_") as folder:
        command = [sys.executable, "-m", *module, json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(command, cwd=ROOT, env=_environment(folder), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case} does not compile: {done.stderr.strip().splitlines()[-1:]}")
        return read(Path(folder), name) if name else None, done.stdout.splitlines()[-1]


def evaluate(case: Case, program: Program, traffic: dict[str, int | None]) -> Row:
    """The row of a case, from its machine code and from what its blocks move (`_traffic`)."""
    weights = _whole(program, runs(case, program), traffic["steps"] // case.busy)
    bundles, cycles = program.cycles(weights, MATMUL_CYCLES[case.chip])
    ideal = case.flops / MXU_FLOPS[case.chip] / case.cores
    return Row(case, round(bundles), cycles, ideal, program.spills(weights), program.load(weights),
               traffic["vmem"], traffic["hbm"])  # fmt: skip


def _whole(program: Program, parts, steps: int) -> list[float]:
    loop = max((s for s in program.spans if s.kind == "loop"), key=lambda s: s.size, default=None)
    weights = program.weights(parts)
    if loop is not None:
        weights = [w * steps if loop.start <= i < loop.end else w for i, w in enumerate(weights)]
    return weights


def _environment(folder: str) -> dict[str, str]:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    flags += " --xla_jf_dump_llo_pass_label_regex=.*final_.*"  # all passes of a large kernel are a gigabyte
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compile at a time
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "LIBTPU_INIT_ARGS": flags,
    }


def compile_for(chip: str, run, arguments):
    """run compiled for one device of `chip`, which need not be there."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
    none = PartitionSpec()
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(run, mesh=mesh, in_specs=none, out_specs=none, check_vma=False)
        return jax.jit(mapped).lower(*arguments).compile()


def _worker(case: Case) -> None:
    run, arguments = build(case)
    compile_for(case.chip, run, arguments)
    print(json.dumps(_traffic(run, arguments, case.name)))


def _traffic(run, arguments, name: str) -> dict[str, int | None]:
    """Grid steps, VMEM bytes of blocks (each is held twice), and bytes that blocks move over HBM."""
    import jax
    import numpy as np
    from jax.extend.core import jaxprs_in_params

    def kernels(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from kernels(inner)

    found = list(kernels(jax.make_jaxpr(run)(*arguments).jaxpr))
    named = [e for e in found if fnmatch.fnmatch(str(e.params["name"]), f"{name}*")]
    mapping = (named or found)[-1].params["grid_mapping"]
    grid = [int(n) for n in mapping.grid]
    steps = np.stack([g.ravel() for g in np.indices(grid)], axis=1).astype(np.int32)
    vmem = hbm = 0
    for block in mapping.block_mappings:
        sizes = [getattr(d, "block_size", d if isinstance(d, int) else 1) for d in block.block_shape]
        size = int(np.prod(sizes)) * block.array_aval.dtype.itemsize
        vmem += 2 * size
        index = block.index_map_jaxpr
        if any(e.primitive.name == "get" for e in index.jaxpr.eqns):  # data decide which block comes next
            hbm = None
        if hbm is None:
            continue

        def place(row, index=index):
            unread = [None] * (len(index.jaxpr.invars) - len(grid))  # prefetched scalars
            return jax.numpy.stack(
                [jax.numpy.int32(x) for x in jax.core.eval_jaxpr(index.jaxpr, index.consts, *row, *unread)]
            )

        places = np.asarray(jax.vmap(place)(steps))
        hbm += size * (1 + int((places[1:] != places[:-1]).any(axis=1).sum()))
    return {"steps": len(steps), "vmem": vmem, "hbm": hbm}


def table(rows: Iterable[Row]) -> str:
    """Markdown, a row a case."""
    columns = ["chip", "direction", "kernel", "T x M", "blocks", "bundles", "cycles", "ideal", "HBM", "raw %", "corr %"]
    columns += ["spills", "VMEM MB", "HBM / least", *UNITS]
    lines = []
    for r in rows:
        c = r.case
        extra = "".join(
            f", {x}"
            for x, on in ((c.rotation, c.kernel == "memory_attention"), ("segments", c.segments), ("counted", c.valid))
            if on
        )
        cells = [c.chip, c.direction, c.kernel + extra, f"{c.queries} x {c.slots}", ", ".join(map(str, c.chosen))]
        cells += [r.bundles, round(r.cycles), round(r.ideal), round(r.hbm_cycles), percent(r.raw)]
        cells += [percent(r.utilisation), r.spills, r.vmem, r.moved, *(f"{100 * r.load[unit]:.0f}" for unit in UNITS)]
        lines.append(cells)
    return markdown(columns, lines)


def percent(share: float) -> str:
    """With one decimal."""
    return f"{100 * share:.1f}"


def candidates(case: Case) -> list[tuple[int, ...]]:
    """Block sizes that the search tries."""
    t, m = case.queries, case.slots
    if case.kernel == "memory_attention":
        if case.small:
            return [(min(q, t), r, h) for q in (1024, 2048) for r in (256, 512) for h in (1, 2, 4) if r <= t]
        if case.direction == "backward":
            slots = [s for s in (256, 512, 896, 1024, 1664, 2048) if m % s == 0]
            return [(min(q, t), s, r) for q in (1024, 2048) for s in slots for r in (256, 512) if q <= t]
        return [(q, r, s) for q in (512, 1024, 2048) for r in (256, 512) for s in (256, 512, 1024) if q <= t and s <= m]
    kv = sorted({s for s in (256, 1024, 2048, m) if m % s == 0})
    compute = [c for c in (256, 512, 1024) if c <= m]
    return [(q, s, c) for q in (512, 1024, 2048) for s in kv for c in compute if q <= t and s % c == 0]


def search(case: Case, tries: int | None = None) -> list[Row]:
    """Rows of every candidate that compiles, fewest cycles first."""
    rows = []
    for blocks in candidates(case)[:tries]:
        try:
            rows.append(measure(dataclasses.replace(case, blocks=blocks)))
        except (RuntimeError, ValueError) as error:
            print(f"{blocks}: {str(error)[:200]}", file=sys.stderr, flush=True)
        else:
            print(f"{case.chip} {case.direction} {case.kernel} {case.slots} {blocks}: "
                  f"corr {100 * rows[-1].utilisation:.1f}", file=sys.stderr, flush=True)  # fmt: skip
    return sorted(rows, key=lambda r: r.cycles)


def as_json(row: Row, splash: Row | None, flash: Row | None = None) -> dict:
    """One line of --json; splash and flash: the same work there."""
    c = row.case
    return {
        "kernel": c.kernel,
        "chip": c.chip,
        "direction": c.direction,
        "shape": {"batch": c.batch, "queries": c.queries, "slots": c.slots, "heads": c.heads, "kv_heads": c.kv_heads,
                  "head_dim": c.head_dim},
        "rotation": c.rotation,
        "segments": c.segments,
        "valid": c.valid,
        "blocks": list(c.chosen),
        "mxu_utilisation": round(row.utilisation, 4),
        "mxu_utilisation_raw": round(row.raw, 4),
        "splash_mxu_utilisation": splash and round(splash.utilisation, 4),
        "splash_blocks": splash and list(splash.case.chosen),
        "flash_mxu_utilisation": flash and round(flash.utilisation, 4),
        "bundles": row.bundles,
        "cycles": round(row.cycles),
        "ideal_cycles": round(row.ideal),
        "hbm_cycles": round(row.hbm_cycles),
        "spills": row.spills,
        "unit_load": {k: round(v, 4) for k, v in row.load.items()},
        "vmem_bytes": row.vmem_bytes,
        "hbm_bytes": row.hbm_bytes,
        "hbm_minimum_bytes": c.minimum_bytes,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e", "v5p"], choices=list(TOPOLOGY))
    parser.add_argument(
        "--directions", nargs="+", default=["forward", "backward"], choices=["forward", "backward", "decode"]
    )
    parser.add_argument("--slots", nargs="+", type=int, default=[4096])
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rotation", default="tables", choices=["tables", "positions", "none"])
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--valid", action="store_true", help="the slots in use are counted, as in a bank that fills")
    parser.add_argument(
        "--kernel",
        default="memory_attention",
        choices=["memory_attention", "causal_attention", "rope_dhr", "splash", "flash"],
    )
    parser.add_argument(
        "--case", nargs="+", help="of causal_attention: one, four, lognormal, group, heads64, chunk, decode"
    )
    parser.add_argument("--blocks", type=int, nargs=3, default=())
    parser.add_argument("--alone", action="store_true", help="leave the comparison out")
    parser.add_argument("--search", action="store_true", help="try all block sizes, best first")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        case = json.loads(args.worker)
        return _worker(Case(**case | {"blocks": tuple(case["blocks"])}))
    if args.kernel in ("causal_attention", "rope_dhr"):
        from benchmarks import tpu_causal, tpu_rope

        if args.kernel == "rope_dhr":
            rows = tpu_rope.rows_of(args.chips)
            print(tpu_rope.table(rows))
        else:
            rows = tpu_causal.rows_of(args.chips, args.directions, args.case)
            print(tpu_causal.table(rows))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    rows, shown = [], []
    for chip in args.chips:
        for direction in args.directions:
            for slots in args.slots:
                case = Case(
                    kernel=args.kernel, direction=direction, chip=chip, slots=slots,
                    queries=16 if direction == "decode" else args.queries, heads=args.heads,
                    kv_heads=args.kv_heads or args.heads, head_dim=args.head_dim, dtype=args.dtype,
                    rotation=args.rotation, segments=args.segments, valid=args.valid,
                    blocks=tuple(args.blocks),
                )  # fmt: skip
                if args.search:
                    found = search(case)
                    shown += found
                    rows += [as_json(row, None) for row in found]
                    continue
                row, splash, flash = measure(case), None, None
                shown.append(row)
                same = args.kernel == "memory_attention" and args.heads == case.kv_heads and not args.alone
                if same and direction != "decode":
                    splash = measure(splash_case(case))
                    shown.append(splash)
                if same and direction == "forward" and not args.segments:
                    flash = measure(flash_case(case))
                    shown.append(flash)
                rows.append(as_json(row, splash, flash))
    print(table(shown))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
