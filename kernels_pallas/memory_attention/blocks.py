"""Block sizes of the kernels, by chip, direction and number of queries and slots; TPU first, GPU at the end."""

import dataclasses

import jax.numpy as jnp

from kernels_pallas.lanes import LANES, up

MAX_SLOTS = 12288
"""Slots that one call keeps in VMEM; more are attended in parts that are merged by their log-sum-exp."""
SMALL_SLOTS = 512
"""Up to here the forward kernel for few slots serves."""
MOST_SLOTS = 2944
"""Slots that a grid step of the backward pass reads, at most."""
MAX_QUERIES = 32768
"""Queries times query heads a kv head whose dq one backward call gathers in VMEM; more go in parts."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """Rows of q a grid step, rows whose scores are in flight together, and slots a matmul."""

    q: int = 1024
    rows: int = 512
    slots: int = 512


@dataclasses.dataclass(frozen=True)
class Small:
    """Forward with few slots: rows of q and heads a grid step, and rows of q a matmul."""

    q: int = 2048
    rows: int = 512
    heads: int = 4


@dataclasses.dataclass(frozen=True)
class Backward:
    """Rows of q and slots a grid step, and rows of q a matmul."""

    q: int = 2048
    slots: int = 1024
    rows: int = 512


TUNED: dict[str, dict[str, Forward | Small | Backward]] = {
    "v5e": {
        "forward": Forward(2048, 512, 256),
        "forward, masked": Forward(2048, 512, 256),
        "forward, long": Forward(512, 512, 512),
        "forward, few slots": Small(2048, 512, 4),
        "backward": Backward(2048, 2048, 512),
    },
    "v5p": {
        "forward": Forward(2048, 512, 256),
        "forward, masked": Forward(2048, 512, 256),
        "forward, long": Forward(512, 512, 512),
        "forward, few slots": Small(2048, 512, 4),
        "backward": Backward(2048, 2048, 512),
    },
    "v6e": {
        "forward": Forward(2048, 512, 512),
        "forward, masked": Forward(2048, 512, 256),
        "forward, long": Forward(1024, 512, 512),
        "forward, few slots": Small(2048, 512, 4),
        "backward": Backward(2048, 2048, 512),
    },
}
"""For 2048 queries, 16 heads, head dim 128, bf16: fewest corrected cycles of the compiler's code at 4096 slots (long:
12288, few: 256) among candidates of `python -m benchmarks.tpu_static --search`; README.md lists those compared."""


def heads_together(heads: int, width: int) -> int:
    """How many of a call's heads fill the 128 lanes together; 1 where a head is padded to them."""
    together = LANES // width if LANES % width == 0 else 1
    return together if together <= 4 and heads % together == 0 else 1


CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
"""TensorCores of a chip that share a kernel's heads, or its queries where the number of heads is odd."""


def forward(num_queries: int, num_slots: int, chip: str = "v5e", masked: bool = False, units: int = 2) -> Forward:
    """Blocks for T queries and M slots; queries are padded to whole blocks, slots to 128. `units`: of the kv heads."""
    if num_queries <= 16:
        return Forward(16, 16, 512)
    long = num_slots > 8192
    best = TUNED[chip]["forward, long" if long else "forward, masked" if masked else "forward"]
    if num_queries <= 512:
        rows = up(num_queries, LANES)
        return Forward(rows, rows, best.slots)
    if num_queries % best.q == 0 and (long or num_slots <= 4096):
        return best
    rows = _rows(num_queries)
    blocks = up(num_queries, rows) // rows
    shared = blocks // CORES[chip] if units % CORES[chip] and blocks % CORES[chip] == 0 else blocks
    return Forward(rows if long else rows * next(n for n in (4, 3, 2, 1) if shared % n == 0), rows, best.slots)


def _rows(num_queries: int) -> int:
    """Rows of a matmul that leave least padding, the more the better."""
    return min((512, 384, 256), key=lambda rows: (up(num_queries, rows), -rows))


def small(num_queries: int, num_heads: int, group: int, chip: str = "v5e") -> Small:
    """Blocks for T queries and few slots; queries are padded to whole blocks."""
    best = TUNED[chip]["forward, few slots"]
    rows = min(best.rows, up(num_queries, LANES))
    most = best.heads * best.rows // rows  # fewer rows fill the units as well if there are more heads beside them
    fit = (h for h in (16, 8, 4, 2, 1) if h <= most and num_heads % h == 0 and (h % group == 0 or group % h == 0))
    heads = next(fit)
    return Small(min(best.q, up(num_queries, rows)), rows, heads)


def backward(num_queries: int, num_slots: int, chip: str = "v5e", masked: bool = False) -> Backward:
    """Blocks for T queries and M slots; both are padded to whole blocks. Smaller ones skip more where masked."""
    best = TUNED[chip]["backward"]
    rows = up(num_queries, LANES) if num_queries <= 768 else _rows(num_queries)
    q = up(num_queries, rows)
    q = q if q <= best.q else max(n * rows for n in range(1, best.q // rows + 1) if q % (n * rows) == 0)
    if num_slots <= 1024:
        return Backward(q, up(num_slots, LANES), rows)
    wanted, most = (1024, 1792) if masked else (best.slots, best.slots)
    sizes, whole = list(range(640, most + 1, LANES)), up(num_slots, LANES)
    if all(whole % size for size in sizes):  # then others that leave no padding, for which k and v would be copied
        sizes = [size for size in range(512, MOST_SLOTS + 1, LANES) if whole % size == 0] or sizes
    slots = min(sizes, key=lambda size: (up(num_slots, size), abs(size - wanted)))
    return Backward(q, slots, rows)


GPU_UNITS = 132
"""Streaming multiprocessors of H100 and H200."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Rows (queries by heads of a group) and slots of a block, warps of a grid step, stages of the load pipeline."""

    rows: int
    slots: int
    warps: int
    stages: int


GPU = {
    "decode": {64: Gpu(64, 64, 4, 3), 128: Gpu(64, 64, 4, 3), 256: Gpu(64, 32, 4, 3), "float32": Gpu(32, 32, 4, 1)},
    "forward": {64: Gpu(128, 64, 4, 2), 128: Gpu(128, 32, 4, 2), 256: Gpu(128, 32, 8, 2), "float32": Gpu(32, 32, 4, 1)},
    "dq": {64: Gpu(128, 32, 4, 2), 128: Gpu(64, 32, 4, 2), 256: Gpu(64, 32, 4, 1), "float32": Gpu(32, 16, 4, 1)},
    "dkv": {64: Gpu(64, 64, 4, 2), 128: Gpu(32, 64, 4, 2), 256: Gpu(32, 64, 8, 1), "float32": Gpu(16, 32, 4, 1)},
}
"""H100 and H200, by kernel and head dim up to 64, 128 and 256 (bf16), or fp32. Not timed: of the candidates, compiled
for H200 without one, those with the fewest instructions a matmul that let two grid steps share a multiprocessor and
spill little in the inner loop. `python -m benchmarks.kernels --search` times candidates on a GPU."""
DECODE_ROWS = 64
"""Up to here a call waits for memory alone."""


def gpu_class(kernel: str, num_rows: int, head_dim: int, dtype) -> tuple[str, int | str]:
    """Row and column of the table for "forward", "dq" or "dkv"."""
    if kernel == "forward" and num_rows <= DECODE_ROWS:
        kernel = "decode"
    return kernel, "float32" if dtype == jnp.float32 else next(width for width in (64, 128, 256) if head_dim <= width)


def gpu(kernel: str, num_rows: int, head_dim: int, dtype) -> Gpu:
    """Blocks of "forward", "dq" or "dkv"; a block has no more rows than there are, but 16 for a matmul."""
    row, column = gpu_class(kernel, num_rows, head_dim, dtype)
    found = GPU[row][column]
    return dataclasses.replace(found, rows=min(found.rows, max(16, 1 << (num_rows - 1).bit_length())))


def gpu_splits(programs: int, slot_blocks: int) -> int:
    """Parts of the slots, so that a call with few grid steps gives each multiprocessor two."""
    return 1 if programs >= GPU_UNITS else min(slot_blocks, up(2 * GPU_UNITS, programs) // programs)
