"""Backward kernel for TPUs: dq, dk and dv in one sweep of five matmuls, over the blocks that a list names.

A grid step holds a block of rows of several heads, as in the forward kernel, with transposed scores (keys down, queries
along the lanes), so that the log-sum-exp and delta of each query broadcast over rows for nothing. dq is
complete at the end of a step; dk and dv gather in fp32 in VMEM and go out in steps of their own behind the last block.
Sums are added in one order: the same call gives the same bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.causal_attention import blocks as block_sizes
from kernels_pallas.causal_attention.problem import Spec
from kernels_pallas.lanes import LANES, along_lanes, column, dots

_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def reachable(q_rows: dict[str, jax.Array], k_segments: jax.Array, diagonal: bool) -> jax.Array:
    """bool [M, N]: keys that N queries reach; on the diagonal, those up to its own, else all keys are earlier.

    q_rows [1, N], k_segments [1, M].
    """
    k_column, keys, allowed = column(k_segments), k_segments.shape[1], []
    for start in range(0, q_rows["segments"].shape[1], LANES):
        lanes = slice(start, start + LANES)
        here = k_column == q_rows["segments"][:, lanes]
        if "prefix" in q_rows:
            here = here | (k_column == q_rows["prefix"][:, lanes])
        if diagonal:
            key, row = (jax.lax.broadcasted_iota(jnp.int32, (keys, LANES), axis) for axis in (0, 1))
            here = here & (key <= row + start)
        allowed.append(here)
    return jnp.concatenate(allowed, axis=1)


def _kernel(*refs, spec: Spec, blocks: block_sizes.Blocks, names: tuple[str, ...], num_keys: int):
    ref = dict(zip(names, refs, strict=True))
    dtype = ref["q"].dtype
    dot = dots(dtype)
    batch, member, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    last_member = member == pl.num_programs(2) - 1
    rows, part, width = blocks.rows, blocks.part, blocks.keys
    heads, kv_heads = ref["q_turned"].shape[0], ref["k_turned"].shape[0]
    group, steps, lists = heads // kv_heads, num_keys // rows, num_keys // width
    attending = step < steps
    block = jnp.where(attending, step, step - steps)
    first = pl.multiple_of(block * rows, LANES)
    many = ref["counts"][batch, block]

    def lanes(head):
        return slice(head * LANES, (head + 1) * LANES)

    def queries(at):
        """Segments and prefixes of a part of the rows."""
        here = pl.ds(at, part)
        return {kind: ref[f"q_{kind}"][:, here] for kind in ("segments", "prefix") if f"q_{kind}" in ref}

    def prepare(start):
        """Turns q and k of a part, and makes its delta; k and v are kept for the rows to come."""
        for at in range(start, start + part, LANES):
            here, own = pl.ds(at, LANES), pl.ds(first + at, LANES)
            tables = rotary.unpacked(ref["table"][here]) if spec.turned else None
            for head in range(kv_heads):
                k = ref["k"][here, lanes(head)]
                ref["k_turned"][head, own] = rotary.turned(k, *tables).astype(dtype) if spec.turned else k
                ref["v_kept"][head, own] = ref["v"][here, lanes(head)]
            for head in range(heads):
                q = ref["q"][here, lanes(head)].astype(jnp.float32)
                q = rotary.turned(q, *tables) if spec.turned else q
                ref["q_turned"][head, here] = (q * spec.scale).astype(dtype)
                o, do = (ref[name][here, lanes(head)].astype(jnp.float32) for name in ("o", "do"))
                products = jnp.broadcast_to(jnp.sum(o * do, axis=1, keepdims=True), (LANES, LANES))
                ref["delta"][head : head + 1, here] = along_lanes(products) - ref["dlse"][head : head + 1, here]

    def meet(kv, here, keys, allowed):
        """Rows `here` of the heads of a group meet blocks of keys: adds to dk and dv, returns what it adds to dq."""
        k, v = (jnp.concatenate([ref[name][kv, one] for one in keys]) for name in ("k_turned", "v_kept"))
        dq, dk, dv = {}, [], []
        for head in range(kv * group, (kv + 1) * group):
            q, do = ref["q_turned"][head, here], ref["do"][here, lanes(head)]
            p = jnp.exp2(dot(k, q, _NT) - ref["lse"][head : head + 1, here])
            p = jnp.where(allowed, p, 0.0)
            dv.append(dot(p.astype(dtype), do, _NN))
            ds = (p * (dot(v, do, _NT) - ref["delta"][head : head + 1, here])).astype(dtype)
            dq[head] = dot(ds, k, _TN)
            dk.append(dot(ds, q, _NN))
        for name, sums in (("dk_sum", dk), ("dv_sum", dv)):
            total = functools.reduce(jnp.add, sums)
            for n, one in enumerate(keys):
                ref[name][kv, one] += total[n * one.size : (n + 1) * one.size]
        return dq

    def diagonal():
        for at in range(0, rows, part):
            prepare(at)
            here, own = pl.ds(at, part), queries(at)

            @pl.when(member == 0)
            def _(at=at):
                for name in ("dk_sum", "dv_sum"):
                    ref[name][:, pl.ds(first + at, part)] = jnp.zeros((kv_heads, part, LANES), jnp.float32)

            for kv in range(kv_heads):
                for c in range(at, -1, -part):
                    keys = pl.ds(first + c, part)
                    dq = meet(kv, here, [keys], reachable(own, ref["k_segments"][:, keys], c == at))
                    for head, value in dq.items():
                        ref["dq_sum"][head, here] = value if c == at else ref["dq_sum"][head, here] + value

    def several(count):
        """A turn of a loop over the list, as many entries at a time."""

        def turn(i, _):
            here = pl.ds(0, rows)
            own = [queries(at) for at in range(0, rows, part)]
            own = {kind: jnp.concatenate([x[kind] for x in own], axis=1) for kind in own[0]}
            numbers = [ref["tiles"][batch, block * lists + i * count + n] for n in range(count)]
            keys = [pl.ds(pl.multiple_of(number * width, LANES), width) for number in numbers]
            allowed = reachable(own, jnp.concatenate([ref["k_segments"][:, one] for one in keys], axis=1), False)
            for kv in range(kv_heads):
                for head, dq in meet(kv, here, keys, allowed).items():
                    ref["dq_sum"][head] += dq
            return 0

        return turn

    def put_queries():
        for at in range(0, rows, LANES):
            here = pl.ds(at, LANES)
            tables = rotary.unpacked(ref["table"][here]) if spec.turned else None
            for head in range(heads):
                dq = ref["dq_sum"][head, here] * spec.head_dim**-0.5
                dq = rotary.turned(dq, *tables, inverse=True) if spec.turned else dq
                ref["dq"][here, lanes(head)] = dq.astype(ref["dq"].dtype)

    def put_keys():
        for at in range(0, rows, LANES):
            here, own = pl.ds(at, LANES), pl.ds(first + at, LANES)
            tables = rotary.unpacked(ref["table"][here]) if spec.turned else None
            for head in range(kv_heads):
                dk = ref["dk_sum"][head, own] * math.log(2)  # q carries the scale in powers of two
                dk = rotary.turned(dk, *tables, inverse=True) if spec.turned else dk
                ref["dk"][here, lanes(head)] = dk.astype(ref["dk"].dtype)
                ref["dv"][here, lanes(head)] = ref["dv_sum"][head, own].astype(ref["dv"].dtype)

    def nothing(*outputs):
        for name in outputs:
            ref[name][...] = jnp.zeros_like(ref[name])

    @pl.when(attending & (many >= 0))
    def _():
        diagonal()
        turns = many // blocks.together
        jax.lax.fori_loop(0, turns, several(blocks.together), 0)
        jax.lax.fori_loop(turns * blocks.together, many, several(1), 0)
        put_queries()

    pl.when(attending & (many < 0))(lambda: nothing("dq"))
    pl.when(jnp.logical_not(attending) & last_member & (many >= 0))(put_keys)
    pl.when(jnp.logical_not(attending) & last_member & (many < 0))(lambda: nothing("dk", "dv"))


def backward(
    spec: Spec, arrays: dict[str, jax.Array], *, heads: int, blocks: block_sizes.Blocks
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, T, H*128], dk, dv [B, T, K*128].

    arrays: those of `forward`, o and do [B, T, H*128], lse (log2) and dlse [B, H, T].
    """
    q, k = arrays["q"], arrays["k"]
    batch, num_keys, _ = q.shape
    kv_heads = k.shape[2] // LANES
    many, kv_many = block_sizes.heads_a_step(blocks.heads, heads, kv_heads)
    steps, of_kv = num_keys // blocks.rows, max(1, heads // kv_heads // many)
    arrays = arrays | {name: arrays[name].reshape(batch, heads // many, many, num_keys) for name in ("lse", "dlse")}

    def place(i):  # behind the last block of rows, nothing new is read
        return jnp.minimum(i, steps - 1)

    def again(i):
        return jnp.where(i < steps, i, i - steps)

    def rows(count, index=place):
        def where(b, h, g, i, *_):
            return b, index(i), h * of_kv + g if count == many and of_kv > 1 else h

        return pl.BlockSpec((None, blocks.rows, count * LANES), where)

    def key_rows():
        def where(b, h, g, i, *_):  # moves only while final values are written
            return b, jnp.where(g == of_kv - 1, jnp.maximum(i - steps, 0), 0), h

        return pl.BlockSpec((None, blocks.rows, kv_many * LANES), where)

    q_row = pl.BlockSpec((None, 1, blocks.rows), lambda b, h, g, i, *_: (b, 0, place(i)))
    head_row = pl.BlockSpec((None, None, many, blocks.rows), lambda b, h, g, i, *_: (b, h * of_kv + g, 0, place(i)))
    kv_rows = pl.BlockSpec((None, blocks.rows, kv_many * LANES), lambda b, h, g, i, *_: (b, place(i), h))
    layout = {
        "q": rows(many),
        "k": kv_rows,
        "v": kv_rows,
        "o": rows(many),
        "do": rows(many),
        "lse": head_row,
        "dlse": head_row,
        "table": pl.BlockSpec((None, blocks.rows, LANES), lambda b, h, g, i, *_: (b, again(i), 0)),
        "q_segments": q_row,
        "q_prefix": q_row,
        "k_segments": pl.BlockSpec((None, 1, num_keys), lambda b, *_: (b, 0, 0)),
    }
    inputs = [name for name in layout if name in arrays]
    kept = functools.partial(pltpu.VMEM, (kv_many, num_keys, LANES))
    scratch = {
        "q_turned": pltpu.VMEM((many, blocks.rows, LANES), q.dtype),
        "dq_sum": pltpu.VMEM((many, blocks.rows, LANES), jnp.float32),
        "delta": pltpu.VMEM((many, blocks.rows), jnp.float32),
        "k_turned": kept(k.dtype),
        "v_kept": kept(k.dtype),
        "dk_sum": kept(jnp.float32),
        "dv_sum": kept(jnp.float32),
    }
    scalars = ["tiles", "counts"]
    names = (*scalars, *inputs, "dq", "dk", "dv", *scratch)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, blocks=blocks, names=names, num_keys=num_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, heads // many // of_kv, of_kv, 2 * steps),
            in_specs=[layout[name] for name in inputs],
            out_specs=[rows(many), key_rows(), key_rows()],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (q, k, k)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=block_sizes.VMEM[spec.chip],
        ),
        interpret=spec.interpret,
        name="causal_attention_backward",
    )(*(arrays[name] for name in (*scalars, *inputs)))
