"""The GPU kernels: forward, dq, and dk with dv. Query heads that share a kv head are rows of one matmul.

Row r of a kv head is query r // G of head r % G, so that nothing is transposed or padded in HBM; edges are masked.
Pairs of the rotation are C/2 apart: q and k are read as two halves, turned in registers, and the scores are the sum of
two matmuls. Scores are in powers of two.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

NEVER = -1e30
_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one compiled kernel does, with the rows and the slots of a block."""

    queries: int
    slots: int
    group: int
    head_dim: int
    turn_q: bool
    turn_k: bool
    segments: bool
    limit: bool
    row_block: int
    slot_block: int
    prefix: bool = False
    interpret: bool = False

    @property
    def rows(self) -> int:
        return self.queries * self.group

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 * math.log2(math.e)


class Rows(NamedTuple):
    """A block of rows: query, head in the group, whether there is such a row; all [row_block]."""

    query: jax.Array
    head: jax.Array
    inside: jax.Array | None
    segments: jax.Array | None
    limit: jax.Array | None
    prefix: jax.Array | None


class Slots(NamedTuple):
    """A block of slots: number, whether there is such a slot; all [slot_block]."""

    slot: jax.Array
    inside: jax.Array | None
    segments: jax.Array | None


def padded(width: int) -> int:
    """Lanes that hold width: a power of two, and what a matmul needs at least."""
    return max(16, pl.next_power_of_2(width))


def _both(mask: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    return other if mask is None else mask if other is None else mask & other


def _read(ref, index, mask=None, fill=0):
    return plgpu.load(ref.at[index], mask=mask, other=None if mask is None else jnp.asarray(fill, ref.dtype))


def _lanes(width: int) -> tuple[jax.Array, jax.Array | None]:
    """Numbers of the lanes that hold width, and which of them do; [1, lanes]."""
    lane = jnp.arange(padded(width))[None]
    return lane, None if lane.size == width else lane < width


def _place(at: Rows | Slots) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Index of the rows in q or of the slots in k, as columns, and which exist."""
    index = (at.query[:, None], at.head[:, None]) if isinstance(at, Rows) else (at.slot[:, None],)
    return index, None if at.inside is None else at.inside[:, None]


def _whole(ref, at: Rows | Slots) -> jax.Array:
    """[block, C], padded lanes zero."""
    index, inside = _place(at)
    lane, used = _lanes(ref.shape[-1])
    return _read(ref, (*index, lane), _both(inside, used))


def _halves(ref, at: Rows | Slots) -> list[jax.Array]:
    """The two halves [block, C/2], padded lanes zero."""
    index, inside = _place(at)
    lane, used = _lanes(ref.shape[-1] // 2)
    return [_read(ref, (*index, lane + start), _both(inside, used)) for start in (0, ref.shape[-1] // 2)]


def _tables(ref: dict, side: str, at: Rows | Slots) -> list[jax.Array]:
    """cos and sin [block, C/2], fp32."""
    where = at.query if isinstance(at, Rows) else at.slot
    half = ref[f"{side}_cos"].shape[-1] // 2
    lane, used = _lanes(half)
    mask = _both(None if at.inside is None else at.inside[:, None], used)
    starts = {"cos": 0, "sin": half}
    return [_read(ref[f"{side}_{kind}"], (where[:, None], lane + start), mask) for kind, start in starts.items()]


def _instruction(name: str, *args: jax.Array) -> jax.Array:
    operands = ", ".join(f"${i}" for i in range(len(args) + 1))
    (result,) = plgpu.elementwise_inline_asm(
        f"{name} {operands};",
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result


def _exp2(spec: Spec, x: jax.Array) -> jax.Array:
    """2 ** x in one instruction; XLA's own keeps subnormal results, which takes four."""
    return jnp.exp2(x) if spec.interpret else _instruction("ex2.approx.ftz.f32", x)


def _multiply_add(spec: Spec, x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """x * y + z, which XLA leaves as two instructions."""
    return x * y + z if spec.interpret else _instruction("fma.rn.f32", x, y, z)


def _turned(spec: Spec, first: jax.Array, second: jax.Array, cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    return [_multiply_add(spec, first, cos, -(second * sin)), _multiply_add(spec, second, cos, first * sin)]


def _rows(spec: Spec, ref: dict, start: jax.Array) -> Rows:
    row = start + jnp.arange(spec.row_block)
    query, head = jax.lax.div(row, spec.group), jax.lax.rem(row, spec.group)
    inside = None if spec.rows % spec.row_block == 0 else row < spec.rows
    segments = _read(ref["q_segments"], (query,), inside, -1) if spec.segments else None
    limit = _read(ref["limit"], (query,), inside, 0) if spec.limit else None
    prefix = _read(ref["q_prefix"], (query,), inside, -1) if spec.prefix else None
    return Rows(query, head, inside, segments, limit, prefix)


def _slots(spec: Spec, ref: dict, start: jax.Array) -> Slots:
    slot = start + jnp.arange(spec.slot_block)
    inside = None if spec.slots % spec.slot_block == 0 else slot < spec.slots
    segments = _read(ref["k_segments"], (slot,), inside, -2) if spec.segments else None
    return Slots(slot, inside, segments)


def _queries(spec: Spec, ref: dict, rows: Rows) -> list[jax.Array]:
    """Halves of the block's q, turned and scaled."""
    halves = _halves(ref["q"], rows)
    if spec.turn_q:
        halves = _turned(spec, *halves, *_tables(ref, "q", rows))
    return [(x.astype(jnp.float32) * spec.scale).astype(ref["q"].dtype) for x in halves]


def _keys(spec: Spec, ref: dict, slots: Slots) -> list[jax.Array]:
    """Halves of the block's k, turned."""
    halves = _halves(ref["k"], slots)
    if spec.turn_k:
        halves = [x.astype(ref["k"].dtype) for x in _turned(spec, *halves, *_tables(ref, "k", slots))]
    return halves


def _dot(x: jax.Array, y: jax.Array, dimensions=_NN) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _scores(spec: Spec, rows: Rows, slots: Slots, q: list[jax.Array], k: list[jax.Array], *, transposed=False):
    """[rows, slots] or transposed, with NEVER where a row may not attend."""
    first, second = (k, q) if transposed else (q, k)
    s = _dot(first[0], second[0], _NT) + _dot(first[1], second[1], _NT)
    row: Callable = (lambda x: x[None]) if transposed else (lambda x: x[:, None])
    slot: Callable = (lambda x: x[:, None]) if transposed else (lambda x: x[None])
    allowed = None
    if spec.segments:
        allowed = row(rows.segments) == slot(slots.segments)
    if spec.prefix:
        allowed = allowed | (row(rows.prefix) == slot(slots.segments))
    if spec.limit:
        allowed = _both(allowed, slot(slots.slot) < row(rows.limit))
    if allowed is None and slots.inside is not None:
        allowed = slot(slots.inside)
    return s if allowed is None else jnp.where(allowed, s, NEVER)


def _stretches(ref: dict, count: int) -> list[tuple[jax.Array | int, jax.Array | int]]:
    """Blocks to visit: from, to."""
    if "span" not in ref:
        return [(0, count)]
    return [(ref["span"][n], ref["span"][n + 1]) for n in range(0, ref["span"].shape[-1], 2)]


def _over(stretches: Sequence[tuple[jax.Array | int, jax.Array | int]], step: Callable, carry):
    """What `step(block, carry)` makes of the blocks of all stretches."""
    for first, last in stretches:
        carry = jax.lax.fori_loop(first, last, step, carry)
    return carry


def _store(ref, at: Rows | Slots, value: jax.Array, start: int = 0, width: int | None = None) -> None:
    """Lanes start to start + width of the block."""
    index, inside = _place(at)
    lane, used = _lanes(width or ref.shape[-1])
    plgpu.store(ref.at[(*index, lane + start)], value.astype(ref.dtype), mask=_both(inside, used))


def _store_turned_back(spec: Spec, ref: dict, side: str, name: str, at: Rows | Slots, first, second, scale: float):
    """The gradient of raw q or k from that of turned q or k."""
    if spec.turn_q if side == "q" else spec.turn_k:
        cos, sin = _tables(ref, side, at)
        first, second = _turned(spec, first, second, cos, -sin)
    half = spec.head_dim // 2
    _store(ref[name], at, first * scale, 0, half)
    _store(ref[name], at, second * scale, half, half)


def forward_kernel(*refs, spec: Spec, names: tuple[str, ...], splits: int):
    """o and lse of a block of rows over one of `splits` parts of the slots that it reaches."""
    ref = dict(zip(names, refs, strict=True))
    rows = _rows(spec, ref, pl.program_id(0) * spec.row_block)
    q = _queries(spec, ref, rows)
    stretches = _stretches(ref, pl.cdiv(spec.slots, spec.slot_block))
    if splits > 1:
        [(first, last)] = stretches
        share = jax.lax.div(last - first + splits - 1, splits)
        first = first + pl.program_id(1) * share
        stretches = [(first, jnp.minimum(last, first + share))]

    def step(i, carry):
        top, total, acc = carry
        slots = _slots(spec, ref, i * spec.slot_block)
        s = _scores(spec, rows, slots, q, _keys(spec, ref, slots))
        v = _whole(ref["v"], slots)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        p = _exp2(spec, s - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + jnp.sum(p, axis=1)
        return new_top, total, acc * shrink[:, None] + _dot(p.astype(v.dtype), v)

    top = jnp.full(spec.row_block, NEVER, jnp.float32)
    total = jnp.zeros(spec.row_block, jnp.float32)
    acc = jnp.zeros((spec.row_block, padded(spec.head_dim)), jnp.float32)
    top, total, acc = _over(stretches, step, (top, total, acc))
    some = top > NEVER / 2
    total = jnp.where(some, total, 1.0)
    _store(ref["o"], rows, jnp.where(some, 1 / total, 0.0)[:, None] * acc)
    lse = jnp.where(some, top * math.log(2) + jnp.log(total), -jnp.inf)
    plgpu.store(ref["lse"].at[rows.head, rows.query], lse, mask=rows.inside)


def dq_kernel(*refs, spec: Spec, names: tuple[str, ...]):
    """dq of a block of rows."""
    ref = dict(zip(names, refs, strict=True))
    rows = _rows(spec, ref, pl.program_id(0) * spec.row_block)
    q, do = _queries(spec, ref, rows), _whole(ref["do"], rows)
    lse, delta = _row_sums(ref, rows)

    def step(i, carry):
        slots = _slots(spec, ref, i * spec.slot_block)
        k = _keys(spec, ref, slots)
        p = _exp2(spec, _scores(spec, rows, slots, q, k) - lse[:, None])
        dp = _dot(do, _whole(ref["v"], slots), _NT)
        ds = (p * (dp - delta[:, None])).astype(do.dtype)
        return tuple(dq + _dot(ds, x) for dq, x in zip(carry, k, strict=True))

    zeros = jnp.zeros((spec.row_block, padded(spec.head_dim // 2)), jnp.float32)
    dq = _over(_stretches(ref, pl.cdiv(spec.slots, spec.slot_block)), step, (zeros, zeros))
    _store_turned_back(spec, ref, "q", "dq", rows, *dq, spec.head_dim**-0.5)


def dkv_kernel(*refs, spec: Spec, names: tuple[str, ...]):
    """dk and dv of a block of slots; scores are transposed."""
    ref = dict(zip(names, refs, strict=True))
    slots = _slots(spec, ref, pl.program_id(0) * spec.slot_block)
    k, v = _keys(spec, ref, slots), _whole(ref["v"], slots)

    def step(i, carry):
        *dk, dv = carry
        rows = _rows(spec, ref, i * spec.row_block)
        q, do = _queries(spec, ref, rows), _whole(ref["do"], rows)
        lse, delta = _row_sums(ref, rows)
        p = _exp2(spec, _scores(spec, rows, slots, q, k, transposed=True) - lse[None])
        dv = dv + _dot(p.astype(do.dtype), do)
        ds = (p * (_dot(v, do, _NT) - delta[None])).astype(do.dtype)
        return *(g + _dot(ds, x) for g, x in zip(dk, q, strict=True)), dv

    half, whole = (
        jnp.zeros((spec.slot_block, padded(width)), jnp.float32) for width in (spec.head_dim // 2, spec.head_dim)
    )
    *dk, dv = _over(_stretches(ref, pl.cdiv(spec.rows, spec.row_block)), step, (half, half, whole))
    _store_turned_back(spec, ref, "k", "dk", slots, *dk, math.log(2))  # q holds the scale and log2(e)
    _store(ref["dv"], slots, dv)


def _row_sums(ref: dict, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """lse in powers of two and delta, [row_block]; rows that do not exist get no weight."""
    index = (rows.head, rows.query)
    return _read(ref["lse"], index, rows.inside, -NEVER), _read(ref["delta"], index, rows.inside)


def call(
    kernel: Callable,
    spec: Spec,
    arrays: dict[str, jax.Array],
    outputs: dict[str, jax.ShapeDtypeStruct],
    grid: tuple[int, int],
    *,
    warps: int,
    stages: int,
    interpret: bool,
    **options,
) -> list[jax.Array]:
    """Runs a kernel over grid (blocks, splits) for each kv head and batch row."""
    everything = arrays | outputs
    batch, kv_heads = arrays["k"].shape[0], arrays["k"].shape[2]
    specs = {name: _block_spec(name, x.shape) for name, x in everything.items()}
    return pl.pallas_call(
        functools.partial(kernel, spec=spec, names=tuple(everything), **options),
        grid=(*grid, kv_heads, batch),
        in_specs=[specs[name] for name in arrays],
        out_specs=[specs[name] for name in outputs],
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=f"memory_attention_{kernel.__name__.removesuffix('_kernel')}",
    )(*arrays.values())


_AXES = {
    **dict.fromkeys(("q", "do", "dq"), "BTKGC"),
    **dict.fromkeys(("k", "v", "dk", "dv"), "BMKC"),
    **dict.fromkeys(("q_cos", "q_sin", "k_cos", "k_sin"), "BNC"),
    **dict.fromkeys(("q_segments", "k_segments", "q_prefix", "limit"), "BN"),
    "delta": "BKGT",
    "span": "BIN",
    "o": "SBTKGC",
}
"""Axes of each array; a grid step sees one entry of B, K, I (block) and S (split), and all of the others."""


def _block_spec(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    axes = _AXES.get(name) or ("SBKGT" if len(shape) == 5 else "BKGT")  # lse, written and read

    def index(i, s, h, b):
        at = {"I": i, "S": s, "K": h, "B": b}
        return tuple(at.get(axis, 0) for axis in axes)

    return pl.BlockSpec(tuple(None if axis in "ISKB" else size for axis, size in zip(axes, shape, strict=True)), index)
