"""Times memory_attention on the device at hand, beside plain JAX, jax.nn.dot_product_attention and tokamax.

    python -m benchmarks.kernels                                     # forward, backward, decode; small shapes on a CPU
    python -m benchmarks.kernels --slots 4096 12288 --head-dim 128 --json rows.json
    python -m benchmarks.kernels --search --directions forward       # on a GPU: candidate blocks, best first

memory_attention and plain JAX turn q and k, by tables made once; the others do not rotate. A sample is a chain of calls
in one program, each fed with the result of the one before, so that launching from Python is not in it; what does not
depend on the chain, such as plain JAX's turned keys, may be computed once. tokamax is timed where it is installed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/kernels.py`

from benchmarks.measure import RUNS, in_turns
from benchmarks.tables import markdown
from benchmarks.tpu_kernels import Case
from kernels_pallas import device, memory_attention, rotary_tables
from kernels_pallas.memory_attention import blocks as block_sizes

SMALL = {"queries": 64, "slots": [128], "heads": 2, "head_dim": 64, "dtype": "float32", "repeat": 1}
LARGE = {"queries": 2048, "slots": [4096], "heads": 16, "head_dim": 128, "dtype": "bfloat16", "repeat": 20}


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call of one implementation, a figure a sample."""

    case: Case
    implementation: str
    seconds: list[float]
    blocks: tuple[int, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict:
        kept = ("direction", "batch", "queries", "slots", "heads", "kv_heads", "head_dim", "dtype")
        return {
            **{name: getattr(self.case, name) for name in kept},
            "implementation": self.implementation,
            "blocks": list(self.blocks),
            "device": jax.devices()[0].device_kind,
            "median_seconds": self.median,
            "seconds": self.seconds,
            "flops_per_second": self.case.flops / self.median,
            "bytes_per_second": self.case.minimum_bytes / self.median,
        }

    def cells(self) -> list[str]:
        """A row of the table."""
        c, low, high = self.case, min(self.seconds), max(self.seconds)
        flops, moved = c.flops / self.median, c.minimum_bytes / self.median
        peak = device.peak(jax.devices()[0].device_kind)
        share = "-" if peak is None else f"{100 * max(flops / peak.flops, moved / peak.hbm):.0f}"
        cells = [c.direction, f"{c.queries} x {c.slots}", f"{c.heads} / {c.kv_heads} x {c.head_dim} {c.dtype}"]
        cells += [self.implementation + (f" {self.blocks}" if self.blocks else ""), f"{1e3 * self.median:.3g}"]
        cells += [f"{1e3 * low:.3g} to {1e3 * high:.3g}", f"{flops / 1e12:.3g}", f"{moved / 1e9:.3g}", share]
        return cells


COLUMNS = ["direction", "T x M", "heads / kv heads x head dim", "implementation", "median ms", "spread ms"]
COLUMNS += ["TFLOP/s", "GB/s", "% of peak"]


def implementations(case: Case) -> dict[str, Callable]:
    """Functions o(q, k, v) by name, those that can run here."""
    turned = case.direction == "decode"
    tables = {"q_pos": rotary_tables(jnp.arange(case.queries)[None].repeat(case.batch, 0), 1e6, case.head_dim)}
    if not turned:
        tables["k_pos"] = rotary_tables(jnp.arange(case.slots)[None].repeat(case.batch, 0), 1e6, case.head_dim)
    found = {}
    if jax.default_backend() != "cpu":
        found["memory_attention"] = functools.partial(
            memory_attention, **tables, k_rotated=turned, implementation=jax.default_backend()
        )
    found["plain JAX"] = functools.partial(memory_attention, **tables, k_rotated=turned, implementation="xla")
    found["jax.nn, XLA"] = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    if jax.default_backend() == "gpu":
        found["jax.nn, cuDNN"] = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if importlib.util.find_spec("tokamax"):
        import tokamax

        found["tokamax"] = tokamax.dot_product_attention
    return found


def chained(case: Case, attend: Callable, repeat: int) -> Callable:
    """A program that calls `attend` or its gradient `repeat` times."""

    @jax.jit
    def run(q, k, v, do):
        if case.direction != "backward":
            return jax.lax.scan(lambda q, _: (attend(q, k, v), None), q, length=repeat)[0]
        _, back = jax.vjp(attend, q, k, v)
        return jax.lax.scan(lambda last, _: (back(last[0]), None), (do, k, v), length=repeat)[0]

    rng = np.random.default_rng(0)
    q = (case.batch, case.queries, case.heads, case.head_dim)
    kv = (case.batch, case.slots, case.kv_heads, case.head_dim)
    arrays = [jnp.asarray(rng.normal(size=shape), case.dtype) for shape in (q, kv, kv, q)]
    jax.block_until_ready(run(*arrays))
    return lambda: run(*arrays)


def measure(case: Case, repeat: int, runs: int) -> list[Timing]:
    """Timings of each implementation, taken in turns."""
    programs = {}
    for name, attend in implementations(case).items():
        try:
            programs[name] = chained(case, attend, repeat)
        except Exception as error:  # a library may refuse a shape in any way
            print(f"{name}: {case.direction}: {str(error)[:200]}", file=sys.stderr, flush=True)
    seconds = in_turns(*programs.values(), runs=runs) / repeat
    return [Timing(case, name, seconds[:, i].tolist()) for i, name in enumerate(programs)]


def candidates(kernel: str) -> list[block_sizes.Gpu]:
    """Blocks that the search tries."""
    rows = (16, 32, 64) if kernel == "decode" else (32, 64, 128)
    grid = [(r, s, w, n) for r in rows for s in (32, 64, 128) for w in (4, 8) for n in (1, 2, 3)]
    return [block_sizes.Gpu(*sizes) for sizes in grid]


def search(case: Case, repeat: int, runs: int, tried: list[block_sizes.Gpu] | None = None) -> list[Timing]:
    """Timings of memory_attention with each candidate that compiles, by kernel, best first."""
    group = case.heads // case.kv_heads
    shape = (case.queries * group, case.head_dim, jnp.dtype(case.dtype))
    found = []
    for kernel in ("dq", "dkv") if case.direction == "backward" else (block_sizes.gpu_class("forward", *shape)[0],):
        name, column = block_sizes.gpu_class(kernel, *shape)
        chosen, timings = block_sizes.GPU[name][column], []
        for blocks in tried or candidates(name):
            block_sizes.GPU[name][column] = blocks
            try:
                attend = implementations(case)["memory_attention"]
                seconds = in_turns(chained(case, attend, repeat), runs=runs)[:, 0] / repeat
            except Exception as error:  # too much shared memory, for one
                print(f"{name} {blocks}: {str(error)[:100]}", file=sys.stderr, flush=True)
                continue
            finally:
                block_sizes.GPU[name][column] = chosen
            timings.append(Timing(case, f"memory_attention {name}", seconds.tolist(), dataclasses.astuple(blocks)))
        found += sorted(timings, key=lambda t: t.median)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the table."""
    small = jax.default_backend() == "cpu"
    defaults = SMALL if small else LARGE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = ["forward", "backward", "decode"]
    parser.add_argument("--directions", nargs="+", default=directions, choices=directions)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--queries", type=int, default=defaults["queries"])
    parser.add_argument("--decode-queries", type=int, default=1, help="queries a row in decoding, 1 to 16")
    parser.add_argument("--slots", nargs="+", type=int, default=defaults["slots"])
    parser.add_argument("--heads", type=int, default=defaults["heads"])
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=defaults["head_dim"])
    parser.add_argument("--dtype", default=defaults["dtype"], choices=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=defaults["repeat"], help="calls a sample")
    parser.add_argument("--runs", type=int, default=RUNS, help="samples behind each median")
    parser.add_argument("--search", action="store_true", help="time candidate blocks, best first (GPU)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args(arguments)
    if args.search and jax.default_backend() != "gpu":
        parser.error(f"--search times blocks of the GPU kernels, and the device is {jax.devices()[0].device_kind}")
    rows = []
    for direction in args.directions:
        for slots in args.slots:
            case = Case(
                direction=direction, batch=args.batch, slots=slots, heads=args.heads,
                queries=args.decode_queries if direction == "decode" else args.queries,
                kv_heads=args.kv_heads or args.heads, head_dim=args.head_dim, dtype=args.dtype,
            )  # fmt: skip
            found = (search if args.search else measure)(case, args.repeat, args.runs)
            for row in found:
                print(*row.cells(), sep=", ", file=sys.stderr, flush=True)
            rows += found
    print(markdown(COLUMNS, (row.cells() for row in rows)))
    if args.json:
        args.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
