"""Static cycles of causal attention on packed rows, beside splash attention and the rotation that XLA does.

    python -m benchmarks.tpu_static --kernel causal_attention --case one four --json rows.json

A row's cycles are those of the kernel's code, each region as often as the row's segments make it run, and XLA's own
estimate of what stands around the kernel (lists of blocks, padding of narrow heads, sums of partial dq). Splash masks
other samples but visits their blocks, so that its count is that of the triangle.
"""

import dataclasses
import functools
import itertools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import tpu_cached, tpu_static
from benchmarks.tables import markdown
from benchmarks.tpu_dump import Program, outermost, regions
from kernels_pallas import rotary
from kernels_pallas.causal_attention import blocks as block_sizes
from kernels_pallas.causal_attention import tpu
from kernels_pallas.causal_attention.problem import Inputs, Problem, meeting
from kernels_pallas.lanes import LANES, up
from kernels_pallas.memory_attention.blocks import CORES
from vlmem_jax.nn import rope

MATMULS = {"forward": 2, "backward": 5}
SPLASH_BLOCKS = {
    "forward": [(1024, 1024, 512), (1024, 2048, 512)],
    "backward": [(1024, 1024, 512), (1024, 2048, 512)],
}
"""Rows of q, keys a step, keys a matmul; the best is compared."""


@dataclasses.dataclass(frozen=True)
class CausalCase:
    """A packed row (or ten) on one chip."""

    name: str
    chip: str
    direction: str
    heads: int = 32
    kv_heads: int = 8
    kernel: str = "causal_attention"
    """Or "splash", "rotation" (XLA's)."""
    blocks: tuple[int, ...] = ()
    """Block sizes of splash."""

    @property
    def head_dim(self) -> int:
        return 64 if self.name == "heads64" else LANES

    @property
    def length(self) -> int:
        return 10240 if self.name == "group" else 16384


def rows(case: CausalCase) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Segments and prefixes [T] of the rows of a case."""
    if case.name == "group":  # a prompt and 16 answers
        lengths = [2048] + [512] * 16
        segments = np.repeat(np.arange(1, 18), lengths)
        return [(segments, np.where(segments > 1, 1, 0))]
    if case.name == "four":  # equal but for boundaries off the blocks
        return [(np.repeat(np.arange(1, 5), [3996, 4133, 4296, 3959]), None)]
    if case.name == "lognormal":
        return [(_lognormal(seed, case.length), None) for seed in range(10)]
    return [(np.ones(case.length, np.int32), None)]


def _lognormal(seed: int, length: int, count: int = 8, sigma: float = 0.5) -> np.ndarray:
    """Segments of samples whose lengths are drawn, stretched to fill the row."""
    drawn = np.random.default_rng(seed).lognormal(0, sigma, count)
    ends = np.round(np.cumsum(drawn) / drawn.sum() * length).astype(int)
    return np.repeat(np.arange(1, count + 1), np.diff(ends, prepend=0))


def useful_share(segments: np.ndarray, prefix: np.ndarray | None) -> float:
    """Pairs that meet, over those of the row's triangle."""
    lengths = np.bincount(segments)[1:].astype(float)
    pairs = (lengths * (lengths + 1) / 2).sum()
    if prefix is not None:
        pairs += lengths[prefix[prefix > 0] - 1].sum()
    return pairs / (len(segments) * (len(segments) + 1) / 2)


def build(case: CausalCase):
    """(function, abstract arguments)."""
    return {"causal_attention": _own, "splash": _splash, "rotation": _rotation}[case.kernel](case)


def _shapes(case: CausalCase):
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, kv = (array((1, case.length, n * case.head_dim)) for n in (case.heads, case.kv_heads))
    table = jax.ShapeDtypeStruct((1, case.length, case.head_dim), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, case.length), jnp.int32)
    return q, kv, rotary.Tables(table, table), ids


def _own(case: CausalCase):
    """What the backend does, of arrays [B, T, H*C], as the projections before and after it make and take them."""
    q, kv, tables, ids = _shapes(case)
    problem = Problem(chip=case.chip)
    lse = jax.ShapeDtypeStruct((1, case.heads, case.length), jnp.float32)

    def apart(x):
        return x.reshape(*x.shape[:2], -1, case.head_dim)

    def flat(x):
        return x.reshape(*x.shape[:2], -1) if x.dtype == jnp.bfloat16 else x

    def inputs(q, k, v, tables, segments, prefix):
        return Inputs(apart(q), apart(k), apart(v), tables, segments, prefix if case.name == "group" else None)

    def forward(*arrays):
        return jax.tree.map(flat, tpu.forward(problem, inputs(*arrays)))

    def backward(o, lse, do, *arrays):
        none = jnp.zeros_like(lse)
        return jax.tree.map(flat, tpu.backward(problem, inputs(*arrays), apart(o), lse, apart(do), none))

    given = q, kv, kv, tables, ids, ids
    return (forward, given) if case.direction == "forward" else (backward, (q, lse, q, *given))


def _splash(case: CausalCase):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    rows, keys, compute = case.blocks
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=keys, block_kv_compute=compute, block_q_dkv=rows, block_kv_dkv=keys,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((case.length, case.length))] * case.heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, kv = (array((n, case.length, LANES)) for n in (case.heads, case.kv_heads))
    ids = jax.ShapeDtypeStruct((case.length,), jnp.int32)

    def forward(q, k, v, ids):
        return kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids))

    def backward(q, k, v, ids, do):
        return jax.vjp(lambda *qkv: forward(*qkv, ids), q, k, v)[1](do)

    return (forward, (q, kv, kv, ids)) if case.direction == "forward" else (backward, (q, kv, kv, ids, q))


def _rotation(case: CausalCase):
    """Forward, q and k turned as the decoder does it in plain JAX; backward, dq and dk turned back."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, k = (array((1, case.length, n, case.head_dim)) for n in (case.heads, case.kv_heads))
    table = jax.ShapeDtypeStruct((1, case.length, case.head_dim // 2), jnp.float32)

    def turn(q, k, cos, sin):
        return [rope.rotate(x, (cos, sin)) for x in (q, k)]

    def back(q, k, *tables):
        return jax.vjp(lambda *qk: turn(*qk, *tables), q, k)[1]([q, k])

    return (turn if case.direction == "forward" else back), (q, k, table, table)


@functools.cache
def dumped(case: CausalCase) -> tuple[Program | None, float]:
    """The kernel's code, and XLA's estimate in cycles of what stands around it.

    Raises: RuntimeError with the compiler's last words.
    """
    names = {
        "causal_attention": f"causal_attention_{case.direction}",
        "splash": f"splash_mha_{'fwd' if case.direction == 'forward' else 'dkv'}",
    }
    program, said = tpu_static.dumped(["benchmarks.tpu_causal"], case, names.get(case.kernel))
    return program, float(said)


def own_cycles(case: CausalCase, program: Program, segments: np.ndarray, prefix: np.ndarray | None) -> float:
    """Corrected cycles of the kernel on a row.

    Raises: ValueError where the code has other conditional parts than the kernel is known to have.
    """
    find = block_sizes.forward if case.direction == "forward" else block_sizes.backward
    blocks = find(case.length, case.heads, case.kv_heads, 2, case.chip)
    length = up(case.length, blocks.rows)
    padded = [
        None if x is None else jnp.pad(jnp.asarray(x), (0, length - case.length))[None] for x in (segments, prefix)
    ]
    counts = np.asarray(meeting(*padded, blocks.rows, blocks.keys).counts[0])
    real = counts[counts >= 0]
    turns, left = (real // blocks.together).sum(), (real % blocks.together).sum()
    body, tops = regions(program)
    attend = max(tops, key=lambda s: s.size)
    before, after = tops[: tops.index(attend)], tops[tops.index(attend) + 1 :]
    expected = {"forward": 2, "backward": 3}[case.direction]
    loops = outermost([s for s in program.spans if s.kind == "loop" and attend.start < s.start and s.end <= attend.end])
    if before or len(after) != expected or len(loops) != 2:
        raise ValueError(f"{case}: unknown parts {[(s.kind, s.start, s.size) for s in tops]} and loops {loops}")
    steps = len(counts) * (2 if case.direction == "backward" else 1)
    heads, _ = block_sizes.heads_a_step(blocks.heads, case.heads, case.kv_heads)
    runs = {attend: len(real) / steps, loops[0]: turns / len(real), loops[1]: left / len(real)}
    runs |= dict.fromkeys(after, 0.0)
    if case.direction == "backward":
        runs[after[1]] = len(real) / steps  # dk and dv go out
    weights = program.weights(runs)
    groups = case.heads // heads
    sweeps = groups / (CORES[case.chip] if groups % CORES[case.chip] == 0 else 1)
    inside = [w * steps * sweeps if body.start <= i < body.end else w for i, w in enumerate(weights)]
    return program.cycles(inside, tpu_static.MATMUL_CYCLES[case.chip])[1]


def splash_cycles(case: CausalCase, program: Program) -> float:
    """Corrected cycles of splash on a row, whatever its segments."""
    rows, keys, _ = case.blocks
    body, tops = regions(program)
    work = max(tops, key=lambda s: s.size)
    q_blocks, k_blocks = case.length // rows, case.length // keys
    met = sum(k * keys < (q + 1) * rows for q in range(q_blocks) for k in range(k_blocks))
    grid, sweeps = q_blocks * k_blocks, k_blocks if case.direction == "backward" else q_blocks
    runs = {span: met / grid if span is work else sweeps / grid for span in tops}
    steps = grid * case.heads / CORES[case.chip]
    weights = [w * steps if body.start <= i < body.end else w for i, w in enumerate(program.weights(runs))]
    return program.cycles(weights, tpu_static.MATMUL_CYCLES[case.chip])[1]


def measure(case: CausalCase) -> dict:
    """A row of --json."""
    best = []
    for blocks in SPLASH_BLOCKS[case.direction]:
        splash = dataclasses.replace(case, kernel="splash", blocks=blocks, name="one")
        splash = dataclasses.replace(splash, name=case.name) if case.name == "group" else splash
        try:
            program, around = dumped(splash)
        except RuntimeError as error:
            print(str(error)[:200], file=sys.stderr)
        else:
            best.append((splash_cycles(splash, program) + around, around, blocks))
    theirs, their_around, blocks = min(best)
    program, around = dumped(case)
    listed = rows(case)
    cycles = [own_cycles(case, program, *row) + around for row in listed]
    rotation = dumped(dataclasses.replace(case, kernel="rotation", name=case.name))[1]
    share = float(np.mean([useful_share(*row) for row in listed]))
    flops = 2.0 * MATMULS[case.direction] * case.heads * case.head_dim * share * case.length * (case.length + 1) / 2
    ours = float(np.mean(cycles))
    return {
        "case": case.name,
        "chip": case.chip,
        "direction": case.direction,
        "cycles": round(ours),
        "splash_cycles": round(theirs + rotation),
        "splash_blocks": list(blocks),
        "splash_around_cycles": round(their_around),
        "rotation_cycles": round(rotation),
        "around_cycles": round(around),
        "useful_share": round(share, 4),
        "ratio": round(ours / (theirs + rotation), 4),
        "mxu_utilisation": round(flops / tpu_static.MXU_FLOPS[case.chip] / CORES[case.chip] / ours, 4),
        "splash_mxu_utilisation": round(flops / share / tpu_static.MXU_FLOPS[case.chip] / CORES[case.chip] / theirs, 4),
        "kept_jax": ours > theirs + rotation,
    }


def table(listed: list[dict]) -> str:
    """Markdown; ratios are to splash with what XLA does around it, over the useful share. Decoding by itself."""
    columns = ["chip", "case", "direction", "useful share", "cycles", "splash alone", "and around it", "ratio / share"]
    columns += ["useful corr %"]
    lines = []
    for r in listed:
        if "splash_cycles" not in r:
            continue
        alone = r["splash_cycles"] - r["splash_around_cycles"] - r["rotation_cycles"]
        cells = [r["chip"], r["case"], r["direction"], f"{r['useful_share']:.3f}", r["cycles"], alone]
        cells += [r["splash_cycles"], f"{r['ratio'] / r['useful_share']:.2f}"]
        lines.append([*cells, tpu_static.percent(r["mxu_utilisation"])])
    decoding = [r for r in listed if "splash_cycles" not in r]
    return "\n".join(filter(None, [lines and markdown(columns, lines), decoding and tpu_cached.table(decoding)]))


CASES = {
    "one": "a sample of 16,384 tokens",
    "four": "four samples in 16,384 tokens, boundaries off the blocks",
    "lognormal": "eight samples in 16,384 tokens, sigma 0.5; the mean of seeds 0 to 9",
    "group": "a prompt of 2,048 tokens and 16 answers of 512 that see it",
    "heads64": "as `one`, heads of 64",
}


def rows_of(chips: list[str], directions: list[str], names: list[str] | None) -> list[dict]:
    """The rows of --json, of each case that is named, or of all of packed rows; those of a cache have no backward.
    Raises ValueError for one that there is not."""
    names = names or list(CASES)
    for name in names:
        if name not in [*CASES, *tpu_cached.CASES]:
            raise ValueError(f"--case must be some of {', '.join([*CASES, *tpu_cached.CASES])}, got {name}")
    found = []
    for chip, way, name in itertools.product(chips, directions, names):
        if name in CASES:
            found.append(measure(CausalCase(name, chip, way)))
        elif way == "forward":
            found.append(tpu_cached.measure(tpu_cached.CachedCase(name, chip)))
        print(found[-1], file=sys.stderr, flush=True)
    return found


def _estimated(text: str) -> float:
    """Cycles that XLA gives to a program's fusions; no loop stands in these."""
    return float(sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))))


def main(argument: str) -> None:
    """Compiles a case, whose dumps the caller reads, and prints XLA's estimate."""
    given = json.loads(argument)
    case = CausalCase(**given | {"blocks": tuple(given["blocks"])})
    run, arguments = build(case)
    print(_estimated(tpu_static.compile_for(case.chip, run, arguments).as_text()))


if __name__ == "__main__":
    main(sys.argv[1])
