"""Block sizes of the kernels, by chip and direction."""

import dataclasses

from kernels_pallas.lanes import LANES, VMEM_LIMIT

VMEM = VMEM_LIMIT | {"v5p": 62 * 2**20}
"""Bytes that a core has for a kernel."""
MOST_HEADS = 8
"""Query heads of a group that a grid step attends together."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of q a grid step, heads a step, keys of a block, rows of a part of the diagonal, and blocks of keys a turn
    of the loop; what is left over goes one at a time."""

    rows: int
    heads: int
    keys: int = 256
    part: int = 256
    together: int = 4


FORWARD = Blocks(256, 8), Blocks(512, 4), Blocks(512, 2), Blocks(512, 1)
BACKWARD = Blocks(512, 4), Blocks(512, 2), Blocks(512, 1)
"""Best first: the first whose keys and values VMEM holds serves. Chosen by the fewest corrected cycles of the
compiler's code for v5e at 16384 tokens, over the cases of `python -m benchmarks.tpu_static`."""


def heads_a_step(wanted: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Query heads of a grid step, about as many as wanted, and kv heads: whole groups, or an even part of a large
    one."""
    group = heads // kv_heads
    if group > MOST_HEADS:
        return max(n for n in range(1, MOST_HEADS + 1) if group % n == 0), 1
    kv = max(n for n in range(1, max(1, wanted // group) + 1) if kv_heads % n == 0)
    return kv * group, kv


def forward(length: int, heads: int, kv_heads: int, itemsize: int, chip: str) -> Blocks | None:
    """Blocks for rows of so many tokens; None where VMEM cannot hold the keys and values of a head."""
    return _first(FORWARD, length, heads, kv_heads, itemsize, chip, 2 * itemsize, 5 * itemsize + 12)


def backward(length: int, heads: int, kv_heads: int, itemsize: int, chip: str) -> Blocks | None:
    """The blocks of the backward kernel; dk and dv gather in fp32 beside keys and values."""
    return _first(BACKWARD, length, heads, kv_heads, itemsize, chip, 2 * itemsize + 8, 9 * itemsize + 4)


def _first(listed, length, heads, kv_heads, itemsize, chip, key_bytes, row_bytes) -> Blocks | None:
    """Bytes are those of a lane of a kept key, and of a row of a head in a step: blocks are held twice."""
    for blocks in listed:
        many, kv_many = heads_a_step(blocks.heads, heads, kv_heads)
        kept = -(-length // blocks.rows) * blocks.rows * kv_many * key_bytes
        step = blocks.rows * (many * row_bytes + kv_many * 8 * itemsize + 8)
        spilled = (4 + 2 * many) * 2**20 * blocks.rows * blocks.together // 2048 * itemsize // 2
        if (kept + step) * LANES + spilled <= VMEM[chip]:
            return blocks
    return None
