"""Forward kernel for TPUs: one grid step attends a block of queries of one head to all memory slots, held in VMEM.

The softmax is anchored: each row is shifted by its maximum over the first slots alone, so that nothing is rescaled on
the way. That is exact in floating point as long as the sum stays within 2^+-80; when a row's does not, the block is
computed again with a running maximum. The same loop serves blocks whose segments reach only a part of the slots, and
rows of the batch in which only the first slots are in use.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.lanes import LANES, LOG2_E, NEVER, VMEM_LIMIT, column, dots, lane_sums
from kernels_pallas.memory_attention import blocks as block_sizes

_SAFE = 2.0**80
_NT = (((1,), (1,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Spec:
    """What one compiled kernel does; C is 128 by now, T and M are whole blocks."""

    head_dim: int
    """Before padding; sets the scale and the angles."""
    theta: float
    rotation: str
    """"tables", "positions" (tables made in the kernel) or "none"."""
    heads: int = 1
    """Narrow heads that lie side by side in the 128 lanes, as they do in memory: nothing is padded."""
    k_rotated: bool = False
    segments: bool = False
    limit: bool = False
    valid: bool = False
    """Only so many first slots of each row of the batch are in use; without segments and limits."""
    chip: str = "v5e"
    interpret: bool = False

    @property
    def masked(self) -> bool:
        return self.segments or self.limit

    @property
    def scale(self) -> float:
        """Scores come out in powers of two."""
        return self.head_dim**-0.5 * LOG2_E


def own(spec: Spec, x: jax.Array, head: int) -> jax.Array:
    """x [N, 128] with zeros in the lanes of other heads: a product over all lanes is then that of one head."""
    if spec.heads == 1:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane // spec.head_dim == head, x, jnp.zeros_like(x))


def side_by_side(spec: Spec, parts: list[jax.Array]) -> jax.Array:
    """[N, 128] that takes the lanes of each head from its own part."""
    return functools.reduce(jnp.add, [own(spec, part, head) for head, part in enumerate(parts)])


def mask(
    spec: Spec, q_columns: dict[str, jax.Array], k_segments: jax.Array | None, first_slot, width: int
) -> jax.Array:
    """bool [N, width]: who may attend to slots first_slot.. ; q_columns are [N, 128]."""
    rows = next(iter(q_columns.values())).shape[0]
    allowed = []
    for start in range(0, width, LANES):
        here = None
        if spec.segments:
            here = q_columns["segments"] == k_segments[:, start : start + LANES]
        if spec.limit:
            slot = first_slot + start + jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)
            before = slot < q_columns["limit"]
            here = before if here is None else here & before
        allowed.append(here)
    return jnp.concatenate(allowed, axis=1)


def transposed_mask(spec: Spec, k_segments, q_rows: dict[str, jax.Array], first_slot, count: int) -> jax.Array:
    """bool [count, N]: slots first_slot.. that N queries may attend to; k_segments is a column [count, 128]."""
    width = next(iter(q_rows.values())).shape[1]
    allowed = []
    for start in range(0, width, LANES):
        lanes = slice(start, start + LANES)
        here = None
        if spec.segments:
            here = k_segments == q_rows["segments"][:, lanes]
        if spec.limit:
            before = first_slot + jax.lax.broadcasted_iota(jnp.int32, (count, LANES), 0) < q_rows["limit"][:, lanes]
            here = before if here is None else here & before
        allowed.append(here)
    return jnp.concatenate(allowed, axis=1)


def _kernel(
    *refs, spec: Spec, blocks: block_sizes.Forward, names: tuple[str, ...], num_slots: int, once: bool, apart: int
):
    ref = dict(zip(names, refs, strict=True))
    q_ref, v_ref = ref["q"], ref["v"]
    dtype = q_ref.dtype
    dot = dots(dtype)
    batch, step = pl.program_id(0), pl.program_id(1) * apart + pl.program_id(4)
    valid = ref["valid"][batch] if spec.valid else num_slots
    first_of_head = (pl.program_id(3) == 0) & (pl.program_id(4) == 0)
    last = (num_slots - 1) // blocks.slots * blocks.slots  # where the last chunk of `anchored` begins
    q_rows = q_ref.shape[0]

    if spec.rotation == "positions":

        @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
        def _():
            at = pl.multiple_of(step * q_rows, LANES)
            for r in range(0, q_rows, blocks.rows):
                here = pl.ds(at + r, blocks.rows)
                tables = rotary.tables_in_kernel(column(ref["q_pos"][:, pl.ds(r, blocks.rows)]), ref["angles"][...])
                ref["q_cos"][here], ref["q_sin"][here] = tables

    if not spec.k_rotated:
        k_ref = ref["k_turned"]
        step_rows = math.gcd(num_slots, 1024)

        if spec.rotation == "positions":

            @pl.when(first_of_head & (pl.program_id(2) == 0))
            def _():
                for r in range(0, num_slots, step_rows):
                    here = pl.ds(r, step_rows)
                    tables = rotary.tables_in_kernel(column(ref["k_pos"][:, here]), ref["angles"][...])
                    ref["k_cos"][here], ref["k_sin"][here] = tables

        def turn(here):
            k_ref[here] = rotary.turned(ref["k"][here], ref["k_cos"][here], ref["k_sin"][here]).astype(dtype)

        def turn_all():
            for r in range(0, num_slots, step_rows):
                turn(pl.ds(r, step_rows))

        if not once:
            pl.when(first_of_head)(turn_all)
    else:
        k_ref = ref["k"]

    def queries(here):
        if spec.rotation == "none":
            q = q_ref[here].astype(jnp.float32)
        else:
            at = here if spec.rotation == "tables" else pl.ds(step * q_rows + here.start, here.size)
            q = rotary.turned(q_ref[here], ref["q_cos"][at], ref["q_sin"][at])
        return (q * spec.scale).astype(dtype)

    def columns(here):
        return {kind: column(ref[f"q_{kind}"][:, here]) for kind in ("segments", "limit") if f"q_{kind}" in ref}

    def has_memory(columns):
        some = True
        if spec.segments:
            some = columns["segments"][:, :1] >= 0
        if spec.limit:
            some = some & (columns["limit"][:, :1] > 0)
        return some

    def in_use(s, first_slot):
        """Scores without those of slots, first_slot.. here, that are not in use."""
        slot = first_slot + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
        return jnp.where(slot < valid, s, NEVER)

    def write(here, sums, columns):
        """o, l and m of each head."""
        outputs = []
        for head, (o, l, m) in enumerate(sums):
            inverse = 1 / l
            log = m + jnp.log2(l)
            if spec.masked:
                inverse = jnp.where(has_memory(columns), inverse, 0.0)
                log = jnp.where(has_memory(columns), log, -NEVER)
            elif spec.valid:
                log = jnp.where(m > NEVER / 2, log, -NEVER)
            outputs.append(o * inverse)
            ref["lse"][head : head + 1, here] = jnp.broadcast_to(log, (o.shape[0], LANES)).T[:1]
        ref["o"][here] = side_by_side(spec, outputs).astype(ref["o"].dtype)

    def anchored():
        worst = jnp.ones((1, 1), jnp.float32)
        for r in range(0, q_rows, blocks.rows):
            here = pl.ds(r, blocks.rows)
            block, cols, sums = queries(here), columns(here), []
            for head in range(spec.heads):
                q = own(spec, block, head)
                o = jnp.zeros((blocks.rows, LANES), jnp.float32)
                l = jnp.zeros((blocks.rows, LANES), jnp.float32)
                for c in range(0, num_slots, blocks.slots):
                    width = min(blocks.slots, num_slots - c)
                    slots = pl.ds(c, width)
                    if once and not spec.k_rotated and r == 0:
                        turn(slots)  # hidden under the matmuls
                    s = dot(q, k_ref[slots], _NT)
                    if c == 0:
                        m = jnp.max(s, axis=1, keepdims=True)
                    s = s - m
                    if spec.masked:
                        k_segments = ref["k_segments"][:, slots] if spec.segments else None
                        s = jnp.where(mask(spec, cols, k_segments, c, width), s, NEVER)
                    elif spec.valid and c == last:
                        s = in_use(s, c)
                    p = jnp.exp2(s)
                    l += lane_sums(p)
                    o += dot(p.astype(dtype), v_ref[slots], (((1,), (0,)), ((), ())))
                l = jnp.sum(l, axis=1, keepdims=True)
                sums.append((o, l, m))
                strain = jnp.maximum(l, 1 / l)
                if spec.masked:
                    strain = jnp.where(has_memory(cols), strain, 1.0)
                worst = jnp.maximum(worst, jnp.max(strain, axis=0, keepdims=True))
            write(here, sums, cols)
        return worst[0, 0]

    def running(low, high):
        """Slots of chunks low to high, with a running maximum."""
        width = chunk_width(num_slots, blocks)

        def attend(q, cols):
            def chunk(i, carry):
                m, l, o = carry
                slots = pl.ds(pl.multiple_of(i * width, LANES), width)
                s = dot(q, k_ref[slots], _NT)
                if spec.masked:
                    k_segments = ref["k_segments"][:, slots] if spec.segments else None
                    s = jnp.where(mask(spec, cols, k_segments, i * width, width), s, NEVER)
                elif spec.valid:
                    s = in_use(s, i * width)
                top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                fade, p = jnp.exp2(m - top), jnp.exp2(s - top)
                o = o * fade + dot(p.astype(dtype), v_ref[slots], (((1,), (0,)), ((), ())))
                return top, l * fade + lane_sums(p), o

            ones = jnp.ones((blocks.rows, 1), jnp.float32)
            zeros = jnp.zeros((blocks.rows, LANES), jnp.float32)
            m, l, o = jax.lax.fori_loop(low, high, chunk, (ones * NEVER, zeros, zeros))
            l = jnp.sum(l, axis=1, keepdims=True)
            return o, jnp.where(m > NEVER / 2, l, 1.0), m  # else rows without memory

        def rows(r, _):
            here = pl.ds(pl.multiple_of(r * blocks.rows, LANES), blocks.rows)
            block, cols = queries(here), columns(here)
            write(here, [attend(own(spec, block, head), cols) for head in range(spec.heads)], cols)
            return 0

        jax.lax.fori_loop(0, q_rows // blocks.rows, rows, 0)

    count = num_slots // chunk_width(num_slots, blocks)
    ref["again"][0] = 0
    if spec.masked:
        low, high = ref["active"][batch, step, 0], ref["active"][batch, step, 1]
        few = (high - low) * 4 < count * 3  # then the loop is the shorter way
    elif spec.valid:
        low, high, few = 0, pl.cdiv(valid, chunk_width(num_slots, blocks)), valid <= last
    else:
        low, high, few = 0, count, False
    partly = spec.masked or spec.valid

    if partly and once and not spec.k_rotated:
        pl.when(few)(turn_all)

    def whole():
        ref["again"][0] = jnp.where(anchored() < _SAFE, 0, 1)

    if partly:
        pl.when(jnp.logical_not(few))(whole)
    else:
        whole()
    pl.when((ref["again"][0] == 1) | few)(lambda: running(low, high))


def chunk_width(num_slots: int, blocks: block_sizes.Forward) -> int:
    """Slots of one chunk of `active`, of which the loop takes one a turn."""
    return math.gcd(num_slots, max(512, blocks.slots))


def forward(spec: Spec, arrays: dict[str, jax.Array], *, num_units: int, blocks: block_sizes.Forward, cores: int = 1):
    """o [B, T, U*128] and lse [B, U, S, T] (log2; +1e30 without memory); each of U `num_units` has S `spec.heads`.

    arrays: q [B, T, U*128], k, v [B, M, K*128]; q_cos.. k_sin [B, ., 128] | q_pos, k_pos [B, 1, .] and angles [1, 128];
    q_segments, k_segments, q_limit [B, 1, .]; active [B, T/q, 2]: chunks that a block of queries reaches; valid [B].
    """
    q, k = arrays["q"], arrays["k"]
    (batch, num_queries, _), num_slots = q.shape, k.shape[1]
    kv_heads = k.shape[2] // LANES
    group = num_units // kv_heads
    q_steps = num_queries // blocks.q
    by_heads, by_rows = kv_heads % cores == 0, q_steps % cores == 0  # how cores share the work
    cores = cores if by_heads or by_rows else 1
    per_core, steps = (kv_heads // cores, q_steps) if by_heads else (kv_heads, q_steps // cores)
    apart = 0 if by_heads else steps

    def kv_head(core, j):
        return core * per_core + j if by_heads else j

    def rows(by_head):
        def index(b, core, j, g, i, *_):
            return b, core * apart + i, (kv_head(core, j) * group + g if by_head else 0)

        return pl.BlockSpec((None, blocks.q, LANES), index)

    def slots(by_head):
        return pl.BlockSpec(
            (None, num_slots, LANES), lambda b, core, j, g, i, *_: (b, 0, kv_head(core, j) if by_head else 0)
        )

    q_row = pl.BlockSpec((None, 1, blocks.q), lambda b, core, j, g, i, *_: (b, 0, core * apart + i))
    k_row = pl.BlockSpec((None, 1, num_slots), lambda b, core, j, g, i, *_: (b, 0, 0))
    layout = {
        "q": rows(True),
        "k": slots(True),
        "v": slots(True),
        "q_cos": rows(False),
        "q_sin": rows(False),
        "k_cos": slots(False),
        "k_sin": slots(False),
        "q_pos": q_row,
        "k_pos": k_row,
        "angles": pl.BlockSpec((1, LANES), lambda *_: (0, 0)),
        "q_segments": q_row,
        "q_limit": q_row,
        "k_segments": k_row,
    }
    inputs = [name for name in layout if name in arrays]
    outputs = {
        "o": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct((batch, num_units, spec.heads, num_queries), jnp.float32),
    }
    lse_row = pl.BlockSpec(
        (None, None, spec.heads, blocks.q),
        lambda b, core, j, g, i, *_: (b, kv_head(core, j) * group + g, 0, core * apart + i),
    )
    scratch = {"again": pltpu.SMEM((1,), jnp.int32)}
    if not spec.k_rotated:
        scratch["k_turned"] = pltpu.VMEM((num_slots, LANES), k.dtype)
    if spec.rotation == "positions":
        for name, count in (("q", num_queries), ("k", num_slots)):
            if name == "q" or not spec.k_rotated:
                scratch[f"{name}_cos"] = pltpu.VMEM((count, LANES), jnp.float32)
                scratch[f"{name}_sin"] = pltpu.VMEM((count, LANES), jnp.float32)
    scalars = ["active"] * spec.masked + ["valid"] * spec.valid
    names = (*scalars, *inputs, *outputs, *scratch)
    o, lse = pl.pallas_call(
        functools.partial(
            _kernel,
            spec=spec,
            blocks=blocks,
            names=names,
            num_slots=num_slots,
            once=group * num_queries == blocks.q,
            apart=apart,
        ),  # fmt: skip
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, cores, per_core, group, steps),
            in_specs=[layout[name] for name in inputs],
            out_specs=[rows(True), lse_row],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=list(outputs.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT[spec.chip],
        ),
        interpret=spec.interpret,
        name="memory_attention_forward",
    )(*(arrays[name] for name in (*scalars, *inputs)))
    return o, lse
