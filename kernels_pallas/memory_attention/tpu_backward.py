"""Backward kernel for TPUs: dq, dk and dv in one sweep with five matmuls.

A grid step holds a block of slots and a block of queries. Scores are transposed (slots down, queries along the lanes),
so that the log-sum-exp and delta of each query broadcast over rows for nothing. dq gathers in VMEM over all slots.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.lanes import LANES, VMEM_LIMIT, column, dots
from kernels_pallas.memory_attention import blocks as block_sizes
from kernels_pallas.memory_attention.tpu_forward import Spec, own, side_by_side, transposed_mask

_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def _kernel(*refs, spec: Spec, blocks: block_sizes.Backward, names: tuple[str, ...], grid: tuple[int, ...]):
    ref = dict(zip(names, refs, strict=True))
    dtype = ref["q"].dtype
    dot = dots(dtype)
    batch, head, kv, member, step = (pl.program_id(i) for i in (0, 2, 3, 4, 5))
    num_kv, group, num_steps = grid[3:]
    q_rows, slots = ref["q"].shape[0], ref["k"].shape[0]
    single = group * num_steps == 1 and not spec.masked  # nothing else adds to this block's dk and dv
    # rows of this block of queries in what is kept for the whole head
    base = pl.multiple_of((member * num_steps + step) * q_rows, LANES)
    table_base = pl.multiple_of(step * q_rows, LANES)

    def tables(side, here):
        """Tables of this block's rows `here`, which are kept for all rows where the kernel makes them."""
        if spec.rotation == "positions":
            here = pl.ds((table_base if side == "q" else pl.multiple_of(kv * slots, LANES)) + here.start, here.size)
        return ref[f"{side}_cos"][here], ref[f"{side}_sin"][here]

    if spec.rotation == "positions":
        for side, at, count, due in (
            ("q", table_base, q_rows, (kv == 0) & (member == 0)),
            ("k", pl.multiple_of(kv * slots, LANES), slots, (member == 0) & (step == 0)),
        ):
            if f"{side}_pos" in ref:

                @pl.when(due & (head == 0))
                def _(side=side, at=at, count=count):
                    part = math.gcd(count, 512)
                    for r in range(0, count, part):
                        made = rotary.tables_in_kernel(
                            column(ref[f"{side}_pos"][:, pl.ds(r, part)]), ref["angles"][...]
                        )
                        here = pl.ds(at + r, part)
                        ref[f"{side}_cos"][here], ref[f"{side}_sin"][here] = made

    @pl.when(kv == 0)
    def _():
        for r in range(0, q_rows, blocks.rows):
            here = pl.ds(r, blocks.rows)
            q = ref["q"][here].astype(jnp.float32)
            q = q if spec.rotation == "none" else rotary.turned(q, *tables("q", here))
            ref["q_turned"][pl.ds(base + r, blocks.rows)] = (q * spec.scale).astype(dtype)
            ref["dq_sum"][pl.ds(base + r, blocks.rows)] = jnp.zeros((blocks.rows, LANES), jnp.float32)

    if not single:

        @pl.when((member == 0) & (step == 0))
        def _():
            ref["dk_sum"][...] = jnp.zeros((slots, LANES), jnp.float32)
            ref["dv_sum"][...] = jnp.zeros((slots, LANES), jnp.float32)

    v = ref["v"]
    if spec.k_rotated:
        k = ref["k"]
    else:
        k = ref["k_turned"]

        @pl.when((member == 0) & (step == 0))
        def _():
            k[...] = rotary.turned(ref["k"][...], *tables("k", pl.ds(0, slots))).astype(dtype)

    def chunk(row, k_segments):
        """dk and dv that rows row.. of this block of queries add; dq is added in place."""
        here, kept = pl.ds(row, blocks.rows), pl.ds(base + row, blocks.rows)
        allowed = None
        if spec.masked:
            rows = {kind: ref[f"q_{kind}"][:, here] for kind in ("segments", "limit") if f"q_{kind}" in ref}
            allowed = transposed_mask(spec, k_segments, rows, kv * slots, slots)
        dq, dk, dv = [], [], []
        for head in range(spec.heads):
            q, do = own(spec, ref["q_turned"][kept], head), own(spec, ref["do"][here], head)
            p = jnp.exp2(dot(k[...], q, _NT) - ref["lse"][head : head + 1, here])
            if allowed is not None:
                p = jnp.where(allowed, p, 0.0)
            dv.append(dot(p.astype(dtype), do, _NN))
            ds = (p * (dot(v[...], do, _NT) - ref["delta"][head : head + 1, here])).astype(dtype)
            dq.append(dot(ds, k[...], _TN))
            dk.append(dot(ds, q, _NN))
        ref["dq_sum"][kept] += side_by_side(spec, dq)
        return functools.reduce(jnp.add, dk), functools.reduce(jnp.add, dv)  # zero in the lanes of other heads

    def k_column():
        return column(ref["k_segments"][...]) if spec.segments else None

    def put(dk, dv):
        dk = dk * math.log(2)  # q carries the scale in powers of two
        if not spec.k_rotated:
            dk = rotary.turned(dk, *tables("k", pl.ds(0, slots)), inverse=True)
        ref["dk"][...] = dk.astype(ref["dk"].dtype)
        ref["dv"][...] = dv.astype(ref["dv"].dtype)

    def whole():
        segments = k_column()
        parts = [chunk(r, segments) for r in range(0, q_rows, blocks.rows)]
        dk, dv = (functools.reduce(jnp.add, part) for part in zip(*parts, strict=True))
        if single:
            put(dk, dv)
        else:
            ref["dk_sum"][...] += dk
            ref["dv_sum"][...] += dv

    if spec.masked:
        count = q_rows // blocks.rows
        reached = [ref["active"][batch, kv, step * count + i] for i in range(count)]
        total = functools.reduce(jnp.add, reached)
        pl.when(total * 4 >= count * 3)(whole)

        @pl.when((total * 4 < count * 3) & (total > 0))
        def _():
            segments = k_column()

            def one(i, _):
                @pl.when(ref["active"][batch, kv, step * count + i] == 1)
                def _():
                    dk, dv = chunk(pl.multiple_of(i * blocks.rows, LANES), segments)
                    ref["dk_sum"][...] += dk
                    ref["dv_sum"][...] += dv

                return 0

            jax.lax.fori_loop(0, count, one, 0)
    else:
        whole()

    if not single:
        pl.when((member == group - 1) & (step == num_steps - 1))(lambda: put(ref["dk_sum"][...], ref["dv_sum"][...]))

    @pl.when(kv == num_kv - 1)
    def _():
        for r in range(0, q_rows, blocks.rows):
            here = pl.ds(r, blocks.rows)
            dq = ref["dq_sum"][pl.ds(base + r, blocks.rows)] * spec.head_dim**-0.5
            if spec.rotation != "none":
                dq = rotary.turned(dq, *tables("q", here), inverse=True)
            ref["dq"][here] = dq.astype(ref["dq"].dtype)


def backward(
    spec: Spec, arrays: dict[str, jax.Array], *, num_units: int, blocks: block_sizes.Backward, cores: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, T, U*128], dk, dv [B, M, K*128].

    arrays: those of `forward`, do [B, T, U*128], lse (log2) and delta [B, U, S, T]; active [B, M/slots, T/rows],
    1 where a chunk of queries reaches a block of slots.
    """
    q, k = arrays["q"], arrays["k"]
    (batch, num_queries, _), num_slots = q.shape, k.shape[1]
    kv_heads = k.shape[2] // LANES
    group = num_units // kv_heads
    cores = cores if kv_heads % cores == 0 else 1
    per_core = kv_heads // cores
    grid = (batch, cores, per_core, num_slots // blocks.slots, group, num_queries // blocks.q)

    def q_head(core, j, g):
        return (core * per_core + j) * group + g

    rows = pl.BlockSpec((None, blocks.q, LANES), lambda b, core, j, kv, g, i, *_: (b, i, q_head(core, j, g)))
    q_table = pl.BlockSpec((None, blocks.q, LANES), lambda b, core, j, kv, g, i, *_: (b, i, 0))
    slots = pl.BlockSpec((None, blocks.slots, LANES), lambda b, core, j, kv, g, i, *_: (b, kv, core * per_core + j))
    k_table = pl.BlockSpec((None, blocks.slots, LANES), lambda b, core, j, kv, g, i, *_: (b, kv, 0))
    q_row = pl.BlockSpec((None, 1, blocks.q), lambda b, core, j, kv, g, i, *_: (b, 0, i))
    k_row = pl.BlockSpec((None, 1, blocks.slots), lambda b, core, j, kv, g, i, *_: (b, 0, kv))
    head_row = pl.BlockSpec(
        (None, None, spec.heads, blocks.q), lambda b, core, j, kv, g, i, *_: (b, q_head(core, j, g), 0, i)
    )

    def last_sweep(b, core, j, kv, g, i, *_):  # the block of dq moves only while its final values are written
        final = kv == grid[3] - 1
        return b, jnp.where(final, i, 0), q_head(core, j, jnp.where(final, g, 0))

    layout = {
        "q": rows,
        "k": slots,
        "v": slots,
        "do": rows,
        "lse": head_row,
        "delta": head_row,
        "q_cos": q_table,
        "q_sin": q_table,
        "k_cos": k_table,
        "k_sin": k_table,
        "q_pos": q_row,
        "k_pos": k_row,
        "angles": pl.BlockSpec((1, LANES), lambda *_: (0, 0)),
        "q_segments": q_row,
        "q_limit": q_row,
        "k_segments": k_row,
    }
    inputs = [name for name in layout if name in arrays]
    outputs = {"dq": q, "dk": k, "dv": k}
    scratch = {
        "q_turned": pltpu.VMEM((group * num_queries, LANES), q.dtype),
        "dq_sum": pltpu.VMEM((group * num_queries, LANES), jnp.float32),
    }
    if not spec.k_rotated:
        scratch["k_turned"] = pltpu.VMEM((blocks.slots, LANES), k.dtype)
    if group * grid[5] > 1 or spec.masked:
        scratch["dk_sum"] = pltpu.VMEM((blocks.slots, LANES), jnp.float32)
        scratch["dv_sum"] = pltpu.VMEM((blocks.slots, LANES), jnp.float32)
    if spec.rotation == "positions":
        for side, count in (("q", num_queries), ("k", num_slots)):
            if f"{side}_pos" in arrays:
                scratch[f"{side}_cos"] = pltpu.VMEM((count, LANES), jnp.float32)
                scratch[f"{side}_sin"] = pltpu.VMEM((count, LANES), jnp.float32)
    scalars = ["active"] if spec.masked else []
    names = (*scalars, *inputs, *outputs, *scratch)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, blocks=blocks, names=names, grid=grid),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[layout[name] for name in inputs],
            out_specs=[pl.BlockSpec((None, blocks.q, LANES), last_sweep), slots, slots],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like in outputs.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * 4),
            vmem_limit_bytes=VMEM_LIMIT[spec.chip],
        ),
        interpret=spec.interpret,
        name="memory_attention_backward",
    )(*(arrays[name] for name in (*scalars, *inputs)))
