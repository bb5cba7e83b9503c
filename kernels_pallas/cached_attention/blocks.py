"""Block sizes of the kernel."""

import dataclasses

MOST_ROWS = 512
"""Tokens of a block of queries."""
LEAST_ROWS = 16
"""Rows of a tile of bf16."""
STACKED = 4096
"""Tokens times query heads of a grid step."""
WINDOW = 128
"""Slots that are written together, at most."""
SPILLS = 16 * 2**20
"""Bytes of VMEM for what the compiler cannot keep in registers."""
READ = 4096
"""Slots times kv heads of a grid step: enough that little is lost between steps, few enough that little is read in
vain behind a row's last slot."""
KEYS = (1024, 512, 256, 128)
"""Slots of a grid step: the first that divides the cache. Chosen by the fewest corrected cycles of the compiler's code
for v5e over the case `chunk` of `python -m benchmarks.tpu_static`."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tokens, kv heads and slots of a grid step; rows of q, heads beside each other, and slots of a matmul."""

    rows: int
    kv_heads: int
    keys: int
    part: int = 1024
    matmul: int = 512


def chosen(tokens: int, heads: int, kv_heads: int, slots: int) -> Blocks | None:
    """Blocks for so many tokens over so many slots; None where the slots are no whole blocks."""
    group = heads // kv_heads
    rows = LEAST_ROWS
    while rows < min(tokens, MOST_ROWS) and 2 * rows * group <= STACKED:
        rows *= 2
    sizes = (n for n in range(1, kv_heads + 1) if kv_heads % n == 0)
    many = max(n for n in sizes if n == 1 or 2 * n * rows * group <= STACKED and n * KEYS[-1] <= READ)
    keys = next((keys for keys in KEYS if slots % keys == 0 and keys * many <= READ), None)
    return keys and Blocks(rows, many, keys, matmul=min(512, keys))


def window(tokens: int) -> int:
    """Slots of a window of the cache that so many tokens are written to."""
    size = LEAST_ROWS
    while size < min(tokens, WINDOW):
        size *= 2
    return size
