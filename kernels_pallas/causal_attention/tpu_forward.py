"""Forward kernel for TPUs: a grid step attends a block of rows of several heads to the blocks of keys in their reach.

Keys and values of a head stay in VMEM while its rows go by: a step turns its own block of k, keeps it beside v, and
attends to its diagonal and to those earlier blocks that a list names, made once per row from the segments. All heads of
a step walk the same list, so that a turn of the loop has enough matmuls for small blocks.

The softmax is anchored: rows are shifted by one number, the largest score of a part of the diagonal, so that nothing is
rescaled on the way. That is exact in floating point as long as each row's sum stays within 2^+-80; when one does not,
the block is computed again with a running maximum.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.causal_attention import blocks as block_sizes
from kernels_pallas.causal_attention.problem import Spec
from kernels_pallas.lanes import LANES, NEVER, along_lanes, column, dots, lane_sums

_SAFE = 2.0**80
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def reachable(q_columns: dict[str, jax.Array], k_segments: jax.Array, later: int | None) -> jax.Array:
    """bool [N, M]: keys of a row's segment or prefix; on the diagonal, those up to its own.

    q_columns [N, 128], k_segments [1, M]; later: index of the first row less that of the first key, None: all keys
    are earlier.
    """
    rows, allowed = q_columns["segments"].shape[0], []
    for start in range(0, k_segments.shape[1], LANES):
        keys = k_segments[:, start : start + LANES]
        here = q_columns["segments"] == keys
        if "prefix" in q_columns:
            here = here | (q_columns["prefix"] == keys)
        if later is not None:
            row, key = (jax.lax.broadcasted_iota(jnp.int32, (rows, LANES), axis) for axis in (0, 1))
            here = here & (key + start <= row + later)
        allowed.append(here)
    return jnp.concatenate(allowed, axis=1)


def _kernel(*refs, spec: Spec, blocks: block_sizes.Blocks, names: tuple[str, ...], num_keys: int):
    ref = dict(zip(names, refs, strict=True))
    dtype = ref["q"].dtype
    dot = dots(dtype)
    batch, step = pl.program_id(0), pl.program_id(2)
    rows, part, width = blocks.rows, blocks.part, blocks.keys
    heads, kv_heads = ref["q_turned"].shape[0], ref["k_turned"].shape[0]
    group = heads // kv_heads
    first = pl.multiple_of(step * rows, LANES)
    many = ref["counts"][batch, step]
    lists = num_keys // width

    def of(x, at):
        return {kind: value[at : at + part] for kind, value in x.items()}

    def lanes(head):
        return slice(head * LANES, (head + 1) * LANES)

    def prepare(start):
        """Turns q and k of a part; k and v are kept for the rows to come."""
        for at in range(start, start + part, LANES):  # few at a time, so that the tables stay in registers
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

    def anchors(head):
        """Of each part of the rows, [1, 128] of what it is shifted by."""
        return [ref["m"][head, n : n + 1] for n in range(rows // part)]

    def add(head, keys, allowed):
        """What a block of keys adds to the sums of a head."""
        s = dot(ref["q_turned"][head], ref["k_turned"][head // group, keys], _NT)
        s = s - _wide(jnp.concatenate([jnp.broadcast_to(m, (part, LANES)) for m in anchors(head)]), width)
        p = jnp.exp2(jnp.where(allowed, s, NEVER))
        return lane_sums(p), dot(p.astype(dtype), ref["v_kept"][head // group, keys], _NN)

    def diagonal(columns):
        """The keys beside the rows themselves; each part of the rows begins with its own, which anchor it."""
        for at in range(0, rows, part):
            prepare(at)
            here, own = pl.ds(at, part), of(columns, at)
            for head in range(heads):
                kv = head // group
                q = ref["q_turned"][head, here]
                l = o = None
                for c in range(at, -1, -part):
                    keys = pl.ds(first + c, part)
                    s = dot(q, ref["k_turned"][kv, keys], _NT)
                    if c == at:
                        m = jnp.max(jnp.max(s, axis=0, keepdims=True), axis=1, keepdims=True)
                        ref["m"][head, at // part : at // part + 1] = jnp.broadcast_to(m, (1, LANES))
                    allowed = reachable(own, ref["k_segments"][:, pl.ds(first + c, part)], 0 if c == at else None)
                    p = jnp.exp2(jnp.where(allowed, s - m, NEVER))
                    more = dot(p.astype(dtype), ref["v_kept"][kv, keys], _NN)
                    l = lane_sums(p) if l is None else l + lane_sums(p)
                    o = more if o is None else o + more
                ref["l"][head, here], ref["o_sum"][head, here] = l, o

    def tile(i):
        return pl.ds(pl.multiple_of(ref["tiles"][batch, step * lists + i] * width, LANES), width)

    def several(count, columns):
        """A turn of a loop over the list, as many entries at a time."""

        def turn(i, _):
            keys = [tile(i * count + n) for n in range(count)]
            allowed = [reachable(columns, ref["k_segments"][:, one], None) for one in keys]
            for head in range(heads):
                parts = [add(head, *pair) for pair in zip(keys, allowed, strict=True)]
                ref["l"][head] += functools.reduce(jnp.add, [l for l, _ in parts])
                ref["o_sum"][head] += functools.reduce(jnp.add, [o for _, o in parts])
            return 0

        return turn

    def put(shift):
        """o and log-sum-exp of each head, whose rows were shifted by `shift` [1, rows]; how far a sum went from 1."""
        real = ref["q_segments"][...] > 0
        worst = jnp.ones((1, rows), jnp.float32)
        for head in range(heads):
            l = jnp.broadcast_to(jnp.sum(ref["l"][head], axis=1, keepdims=True), (rows, LANES))
            near = pl.reciprocal(l, approx=True)
            near = near * (2 - l * near)
            inverse = jnp.where(l > 0, near * (2 - l * near), 0.0)  # padding has no keys
            ref["o"][:, lanes(head)] = (ref["o_sum"][head] * inverse).astype(ref["o"].dtype)
            l = along_lanes(l)
            ref["lse"][head : head + 1, :] = jnp.where(real, shift(head) + jnp.log2(l), -NEVER)
            worst = jnp.maximum(worst, jnp.where(real, jnp.maximum(l, 1 / l), 1.0))
        return jnp.max(worst)

    def both_columns():
        return {kind: column(ref[f"q_{kind}"][...]) for kind in ("segments", "prefix") if f"q_{kind}" in ref}

    def running(head, _):
        """A head again, with a running maximum."""
        columns = both_columns()

        def meet(keys, later, carry):
            m, l, o = carry
            s = dot(ref["q_turned"][head], ref["k_turned"][head // group, keys], _NT)
            s = jnp.where(reachable(columns, ref["k_segments"][:, keys], later), s, NEVER)
            top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
            fade, p = jnp.exp2(m - top), jnp.exp2(s - top)
            o = o * fade + dot(p.astype(dtype), ref["v_kept"][head // group, keys], _NN)
            return top, l * fade + lane_sums(p), o

        zeros = jnp.zeros((rows, LANES), jnp.float32)
        carry = jnp.full((rows, 1), NEVER, jnp.float32), zeros, zeros
        for c in range(0, rows, part):
            carry = meet(pl.ds(first + c, part), -c, carry)
        m, l, o = jax.lax.fori_loop(0, many, lambda i, carry: meet(tile(i), None, carry), carry)
        l = jnp.where(m > NEVER / 2, l, 0.0)
        ref["tops"][head], ref["l"][head], ref["o_sum"][head] = jnp.broadcast_to(m, (rows, LANES)), l, o
        return 0

    def attend():
        columns = both_columns()
        diagonal(columns)
        turns = many // blocks.together
        jax.lax.fori_loop(0, turns, several(blocks.together, columns), 0)
        jax.lax.fori_loop(turns * blocks.together, many, several(1, columns), 0)
        worst = put(lambda head: jnp.concatenate([_wide(m, part) for m in anchors(head)], axis=1))
        ref["again"][0] = jnp.where(worst < _SAFE, 0, 1)

    ref["again"][0] = 0
    pl.when(many >= 0)(attend)

    @pl.when(many < 0)  # nothing but padding
    def _():
        ref["o"][...] = jnp.zeros_like(ref["o"])
        ref["lse"][...] = jnp.full_like(ref["lse"], -NEVER)

    @pl.when(ref["again"][0] == 1)
    def _():
        jax.lax.fori_loop(0, heads, running, 0)
        put(lambda head: along_lanes(ref["tops"][head]))


def _wide(x: jax.Array, width: int) -> jax.Array:
    """[N, 128], alike in each lane, to [N, width]."""
    return jnp.concatenate([x] * (width // LANES), axis=1)


def forward(spec: Spec, arrays: dict[str, jax.Array], *, heads: int, blocks: block_sizes.Blocks):
    """o [B, T, H*128] and lse [B, H, T] (log2; +1e30 without keys).

    arrays: q [B, T, H*128], k, v [B, T, K*128]; table [B, T, 128] fp32, cos and sin of each pair; q_segments (-1 or
    more), k_segments, and q_prefix [B, 1, T]; tiles [B, T/rows * T/keys] and counts [B, T/rows], see `Meeting`.
    """
    q, k = arrays["q"], arrays["k"]
    batch, num_keys, _ = q.shape
    kv_heads = k.shape[2] // LANES
    group = heads // kv_heads
    many, kv_many = block_sizes.heads_a_step(blocks.heads, heads, kv_heads)
    steps = heads // many
    of_kv = max(1, group // many)  # steps that share a kv head

    def rows(count, shared=1):
        return pl.BlockSpec((None, blocks.rows, count * LANES), lambda b, h, i, *_: (b, i, h // shared))

    q_row = pl.BlockSpec((None, 1, blocks.rows), lambda b, h, i, *_: (b, 0, i))
    layout = {
        "q": rows(many),
        "k": rows(kv_many, of_kv),
        "v": rows(kv_many, of_kv),
        "table": pl.BlockSpec((None, blocks.rows, LANES), lambda b, h, i, *_: (b, i, 0)),
        "q_segments": q_row,
        "q_prefix": q_row,
        "k_segments": pl.BlockSpec((None, 1, num_keys), lambda b, h, i, *_: (b, 0, 0)),
    }
    inputs = [name for name in layout if name in arrays]
    wide = functools.partial(pltpu.VMEM, (many, blocks.rows, LANES))
    scratch = {
        "q_turned": wide(q.dtype),
        "k_turned": pltpu.VMEM((kv_many, num_keys, LANES), k.dtype),
        "v_kept": pltpu.VMEM((kv_many, num_keys, LANES), k.dtype),
        "m": pltpu.VMEM((many, blocks.rows // blocks.part, LANES), jnp.float32),
        "tops": wide(jnp.float32),
        "l": wide(jnp.float32),
        "o_sum": wide(jnp.float32),
        "again": pltpu.SMEM((1,), jnp.int32),
    }
    scalars = ["tiles", "counts"]
    names = (*scalars, *inputs, "o", "lse", *scratch)
    return pl.pallas_call(
        functools.partial(_kernel, spec=spec, blocks=blocks, names=names, num_keys=num_keys),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, steps, num_keys // blocks.rows),
            in_specs=[layout[name] for name in inputs],
            out_specs=[
                rows(many),
                pl.BlockSpec((None, None, many, blocks.rows), lambda b, h, i, *_: (b, h, 0, i)),
            ],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, steps, many, num_keys), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=block_sizes.VMEM[spec.chip],
        ),
        interpret=spec.interpret,
        name="causal_attention_forward",
    )(*(arrays[name] for name in (*scalars, *inputs)))
