"""Static cycles of rows of different lengths that read a cache: chunks of prompts, and decoding.

    python -m benchmarks.tpu_static --kernel causal_attention --case chunk decode --json rows.json

Own cycles are those of the kernel's code, each region as often as the lengths make it run, or those that the memory
needs for the keys and values of the blocks visited, if they are more, and XLA's estimate of what stands around. Chunks
are compared with splash attention, which visits the whole cache of each row; decoding with XLA's einsum over all slots,
with the same in blocks up to the longest row (as the models do where no kernel serves), and with JAX's paged attention,
to which each kv head of each row is a sequence of its own, so that it, too, reads a cache as it lies.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from benchmarks import tpu_static
from benchmarks.tables import markdown
from benchmarks.tpu_dump import Program, Span, outermost, regions
from kernels_pallas import rotary
from kernels_pallas.cached_attention import blocks as block_sizes
from kernels_pallas.cached_attention import tpu
from kernels_pallas.cached_attention.problem import Inputs, Problem, last_block
from kernels_pallas.device import PEAKS
from kernels_pallas.lanes import LANES
from kernels_pallas.memory_attention.blocks import CORES
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.nn import attention, rope
from vlmem_jax.nn.cached_attention import filled_attention
from vlmem_jax.types import KVCache

SPLASH_BLOCKS = [(512, 2048, 512), (512, 4096, 512), (512, 1024, 512)]
"""Rows of q, keys a step, keys a matmul; the best is compared."""
PAGES = (1024, 2048)
"""Slots of a page, which is a step of paged attention; the best is compared."""
LAYERS = 2
"""Of the cache: enough that a layer is not the whole of it."""


@dataclasses.dataclass(frozen=True)
class CachedCase:
    """The last tokens of each of eight rows read the row's cache, on one chip."""

    name: str
    chip: str
    direction: str = "forward"
    heads: int = 32
    kv_heads: int = 8
    kernel: str = "cached_attention"
    """Or "splash", "rotation" (XLA's), "einsum", "filled" (XLA's in blocks), "paged"."""
    blocks: tuple[int, ...] = ()
    """Block sizes of splash and paged attention."""

    @property
    def tokens(self) -> int:
        return {"chunk": 512, "decode": 1}[self.name]

    @property
    def capacity(self) -> int:
        return {"chunk": 32768, "decode": 4096}[self.name]

    @property
    def lengths(self) -> np.ndarray:
        """Of the rows, an eighth of the cache to all of it, off the blocks."""
        drift = np.array([0, 37, -91, 118, -53, 77, -29, 0])
        return np.arange(1, 9) * (self.capacity // 8) + drift


CASES = {
    "chunk": "512 tokens of each of eight rows read caches of 32,768 slots, of which 4,096 to 32,768 are filled",
    "decode": "a token of each of eight rows reads caches of 4,096 slots, of which 512 to 4,096 are filled",
}


def useful_share(case: CachedCase) -> float:
    """Pairs of tokens and slots up to theirs, over all pairs of tokens and slots."""
    last = np.arange(case.tokens) + 1 - case.tokens
    return float((case.lengths[:, None] + last).mean() / case.capacity)


def build(case: CachedCase):
    """(function, abstract arguments)."""
    makers = {"cached_attention": _own, "splash": _splash, "rotation": _rotation, "paged": _paged}
    return makers.get(case.kernel, _xla)(case)


def _shapes(case: CachedCase):
    batch, array = len(case.lengths), functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q = array((batch, case.tokens, case.heads * LANES))
    kv = array((LAYERS, batch, case.kv_heads, case.capacity, LANES))
    ids = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return q, kv, ids, jax.ShapeDtypeStruct((), jnp.int32)


def _apart(x):
    return x.reshape(*x.shape[:2], -1, LANES)


def _flat(x):
    return x.reshape(*x.shape[:2], -1)


def _own(case: CachedCase):
    q, kv, ids, layer = _shapes(case)
    table = jax.ShapeDtypeStruct((*q.shape[:2], LANES), jnp.float32)

    def run(q, k, v, start, count, layer, tables):
        return _flat(tpu.forward(Problem(chip=case.chip), Inputs(_apart(q), k, v, layer, start, count, tables)))

    return run, (q, kv, kv, ids, ids, layer, rotary.Tables(table, table))


def _splash(case: CachedCase):
    """Of one row, whose keys are given apart from the cache."""
    rows, keys, compute = case.blocks
    mask = masks.CausalMask((case.tokens, case.capacity), offset=case.capacity - case.tokens)
    with jax.ensure_compile_time_eval():
        sizes = splash.BlockSizes(block_q=rows, block_kv=keys, block_kv_compute=compute)
        kernel = splash.make_splash_mha_single_device(masks.MultiHeadMask([mask] * case.heads), block_sizes=sizes)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    q, kv = array((case.heads, case.tokens, LANES)), array((case.kv_heads, case.capacity, LANES))
    ids = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (case.tokens, case.capacity)]

    def run(q, k, v, q_ids, k_ids):
        return kernel(q, k, v, segment_ids=splash.SegmentIds(q_ids, k_ids))

    return run, (q, kv, kv, *ids)


def _rotation(case: CachedCase):
    q = _shapes(case)[0]
    table = jax.ShapeDtypeStruct((*q.shape[:2], LANES // 2), jnp.float32)
    return lambda q, cos, sin: _flat(rope.rotate(_apart(q), (cos, sin))), (q, table, table)


def _xla(case: CachedCase):
    q, kv, ids, layer = _shapes(case)

    def run(q, k, v, start, layer):
        index, cache = start[:, None] + jnp.arange(case.tokens), KVCache(k, v, None, None)
        if case.kernel == "filled":
            longest = int(case.lengths.max())
            return _flat(filled_attention(_apart(q), cache, layer, index, longest))
        slots = jnp.arange(case.capacity)
        return _flat(attention.attend(_apart(q), *cache.layer(layer), slots <= index[:, :, None]))

    return run, (q, kv, kv, ids, layer)


def _paged(case: CachedCase):
    """With one page a step, and the layer chosen by the numbers of its pages."""
    (page,) = case.blocks
    q, kv, ids, layer = _shapes(case)
    rows, pages = len(case.lengths) * case.kv_heads, case.capacity // page

    def run(q, k, v, start, layer):
        q = q.reshape(rows, -1, LANES) * LANES**-0.5
        k, v = (x.reshape(1, -1, page, LANES) for x in (k, v))
        numbers = layer * rows * pages + jnp.arange(rows * pages).reshape(rows, pages)
        lengths = jnp.repeat(start + 1, case.kv_heads)
        out = paged_attention(q, k, v, lengths, numbers, pages_per_compute_block=1)
        return out.reshape(len(case.lengths), 1, -1)

    return run, (q, kv, kv, ids, layer)


@functools.cache
def dumped(case: CachedCase) -> tuple[Program | None, float]:
    """The kernel's code, and XLA's estimate in cycles of what stands around it.

    Raises: RuntimeError with the compiler's last words.
    """
    names = {"cached_attention": "cached_attention", "splash": "splash_mha_fwd", "paged": "paged_attention"}
    program, said = tpu_static.dumped(["benchmarks.tpu_cached"], case, names.get(case.kernel))
    return program, float(said)


def own_cycles(case: CachedCase, program: Program, lengths: np.ndarray) -> tuple[float, float]:
    """Corrected cycles of the kernel, and those that the memory needs for the keys and values of its blocks.

    Raises: ValueError where the code has other conditional parts than the kernel is known to have.
    """
    blocks = block_sizes.chosen(case.tokens, case.heads, case.kv_heads, case.capacity)
    first = np.arange(0, case.tokens, blocks.rows)
    met = last_block(lengths[:, None] - case.tokens, case.tokens, first, blocks.rows, blocks.keys) + 1
    steps, visited = met.size * int(met.max()), int(met.sum())
    body, tops = regions(program)
    work = _working(program, tops)
    if len(work) == 1:  # the compiler's own branch around the steps that are not idle
        tops = outermost([s for s in program.spans if tops[work[0]].holds(s) and s.size > 40])
        work = _working(program, tops)
    if len(work) != 3 or work[1] + 1 != work[2] or work[2] + 1 == len(tops):
        raise ValueError(f"{case}: unknown parts {[(s.kind, s.start, s.size) for s in tops]}")
    begin, meet, running = work
    runs = dict.fromkeys((tops[begin], tops[running + 1]), met.size / steps)  # the latter puts out what was summed
    runs |= {tops[meet]: visited / steps, tops[running]: 0.0}
    runs |= dict.fromkeys(tops[running + 2 :], 0.0)  # rows without tokens
    sweeps = case.kv_heads // blocks.kv_heads
    cycles = _cycles(case, program, body, runs, steps * sweeps, met.shape[0] * sweeps)
    return cycles, _reading(case, visited * blocks.keys * case.kv_heads)


def _working(program: Program, tops: list[Span]) -> list[int]:
    """Which of them have matmuls."""
    return [n for n, top in enumerate(tops) if any(b.matmuls for b in program.bundles[top.start : top.end])]


def _cycles(case: CachedCase, program: Program, body: Span, runs: dict[Span, float], steps: int, apart: int) -> float:
    """Corrected cycles of so many grid steps, which stand in parts that go round the cores."""
    steps /= CORES[case.chip] if apart % CORES[case.chip] == 0 else 1
    weights = [w * steps if body.start <= i < body.end else w for i, w in enumerate(program.weights(runs))]
    return program.cycles(weights, tpu_static.MATMUL_CYCLES[case.chip])[1]


def _reading(case: CachedCase, slots: int) -> float:
    """Cycles that the memory needs for k and v of so many slots of a head."""
    return slots * 2 * 2 * LANES / PEAKS[case.chip].hbm * tpu_static.CLOCK[case.chip]


def splash_cycles(case: CachedCase, program: Program) -> float:
    """Corrected cycles of splash, of all rows."""
    keys = case.capacity // case.blocks[1]
    body, tops = regions(program)
    work = max(tops, key=lambda s: s.size)
    runs = {span: 1.0 if span is work else 1 / keys for span in tops}
    return _cycles(case, program, body, runs, keys * len(case.lengths) * case.heads, case.heads)


def paged_cycles(case: CachedCase, program: Program) -> float:
    """Corrected cycles of paged attention, or those of reading its pages."""
    (page,) = case.blocks
    pages = int((-(-case.lengths // page)).sum()) * case.kv_heads
    body, _ = regions(program)
    inner = max(
        (s for s in program.spans if s.kind == "loop" and body.start < s.start and s.end <= body.end),
        key=lambda s: s.size,
    )
    rows = len(case.lengths) * case.kv_heads
    return max(_cycles(case, program, body, {inner: pages / rows}, rows, 1), _reading(case, pages * page))


def measure(case: CachedCase) -> dict:
    """A row of --json."""
    program, around = dumped(case)
    cycles, full = (
        max(own_cycles(case, program, lengths)) + around
        for lengths in (case.lengths, np.full(len(case.lengths), case.capacity))
    )
    share = useful_share(case)
    row = {"case": case.name, "chip": case.chip, "direction": case.direction, "cycles": round(cycles)}
    row |= {"around_cycles": round(around), "full_cycles": round(full), "useful_share": round(share, 4)}
    row["read_cycles"] = round(own_cycles(case, program, case.lengths)[1])
    if case.name == "decode":
        others = _decoding(case)
        return row | others | {"kept_jax": cycles > min(others.values())}
    row |= _chunk(case, share, cycles)
    return row | {"kept_jax": row["ratio"] > 1}


def _chunk(case: CachedCase, share: float, cycles: float) -> dict:
    rotation, best = dumped(dataclasses.replace(case, kernel="rotation"))[1], []
    for blocks in SPLASH_BLOCKS:
        other = dataclasses.replace(case, kernel="splash", blocks=blocks)
        best.append((splash_cycles(other, dumped(other)[0]), blocks))
    theirs, blocks = min(best)
    flops = 4.0 * len(case.lengths) * case.heads * LANES * share * case.tokens * case.capacity
    ideal = flops / tpu_static.MXU_FLOPS[case.chip] / CORES[case.chip]
    return {
        "splash_cycles": round(theirs + rotation),
        "splash_blocks": list(blocks),
        "splash_around_cycles": 0,
        "rotation_cycles": round(rotation),
        "ratio": round(cycles / (theirs + rotation), 4),
        "mxu_utilisation": round(ideal / cycles, 4),
    }


def _decoding(case: CachedCase) -> dict:
    """XLA turns q for each of them."""
    others = {name: dumped(dataclasses.replace(case, kernel=name))[1] for name in ("rotation", "einsum", "filled")}
    paged = []
    for page in PAGES:
        other = dataclasses.replace(case, kernel="paged", blocks=(page,))
        program, around = dumped(other)
        paged.append(paged_cycles(other, program) + around)
    rotation, others["paged"] = others.pop("rotation"), min(paged)
    return {f"{name}_cycles": round(cycles + rotation) for name, cycles in others.items()}


def table(listed: list[dict]) -> str:
    """Markdown of decoding."""
    columns = {"chip": "chip", "useful share": "useful_share", "cycles": "cycles", "all filled": "full_cycles"}
    columns |= {"XLA, all slots": "einsum_cycles", "XLA in blocks": "filled_cycles", "paged attention": "paged_cycles"}
    return markdown(list(columns), [[row[name] for name in columns.values()] for row in listed])


def main(argument: str) -> None:
    """Compiles a case, whose dumps the caller reads, and prints XLA's estimate."""
    given = json.loads(argument)
    case = CachedCase(**given | {"blocks": tuple(given["blocks"])})
    run, arguments = build(case)
    print(HloProgram(tpu_static.compile_for(case.chip, run, arguments).as_text()).cycles())


if __name__ == "__main__":
    main(sys.argv[1])
