"""Kernel for TPUs: a grid step attends a block of a row's tokens, the heads of a group beside each other, to a block of
the row's keys.

The grid is as long as the longest row is filled; steps behind a shorter row's tokens are idle and read nothing. A cache
is read as it lies, the layer chosen by a number.

The softmax is anchored: a token's scores are shifted by the largest of those over the first keys, so that nothing is
rescaled on the way. That is exact in floating point as long as what a step adds stays below 2^80; when it does not, the
step is computed again with a running maximum, which is the anchor from there on.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.cached_attention.blocks import SPILLS, Blocks
from kernels_pallas.cached_attention.problem import last_block
from kernels_pallas.lanes import LANES, LOG2_E, NEVER, VMEM_LIMIT, dots, lane_sums

_SAFE = 2.0**80
_NT = (((1,), (1,)), ((), ()))
_NN = (((1,), (0,)), ((), ()))


def _kernel(*refs, blocks: Blocks, names: tuple[str, ...], of_row: int):
    """of_row: blocks of queries of a row."""
    ref = dict(zip(names, refs, strict=True))
    dtype, dot = ref["q"].dtype, dots(ref["q"].dtype)
    block, at = pl.program_id(1), pl.program_id(2)
    row, first = block // of_row, block % of_row * blocks.rows
    last = last_block(ref["start"][row], ref["count"][row], first, blocks.rows, blocks.keys)
    rows, stacked = blocks.rows, ref["q_turned"].shape[1]
    here, there = at % 2, 1 - at % 2
    own = ref["start"][row] + first - at * blocks.keys
    """The slot of the block's first token, counted from its first key."""
    real = ref["count"][row] - first
    parts = [
        (kv, slice(i, min(i + blocks.part, stacked)))
        for kv in range(blocks.kv_heads)
        for i in range(0, stacked, blocks.part)
    ]

    def tokens(part, lanes=LANES):
        """int32 [N, lanes]: the token, from the first of the block, of each row of q."""
        index = jax.lax.broadcasted_iota(jnp.int32, (part.stop - part.start, lanes), 0) + part.start
        return index & (rows - 1)

    def ahead(part):
        """int32 [N, 128]: how far each of 128 keys stands behind the token, if the first of both were the same slot."""
        lane = jax.lax.broadcasted_iota(jnp.int32, (part.stop - part.start, LANES), 1)
        return lane - tokens(part)

    def scores(kv, part, keys, behind):
        """[N, M] of M keys; behind: see `ahead`."""
        s = dot(ref["q_turned"][kv, part], ref["k"][kv, keys], _NT)
        seen = [behind <= own - start for start in range(keys.start, keys.stop, LANES)]
        return jnp.where(jnp.concatenate(seen, axis=1), s, NEVER)

    def begin():
        """Turns q, and finds the anchors."""
        tables = rotary.unpacked(ref["table"][...]) if "table" in ref else None
        group = stacked // rows
        for kv in range(blocks.kv_heads):
            for head in range(group):
                lanes = (kv * group + head) * LANES
                q = ref["q"][:, lanes : lanes + LANES].astype(jnp.float32)
                q = q if tables is None else rotary.turned(q, *tables)
                q = jnp.broadcast_to(q, (rows, LANES))  # a token alone fills a tile
                ref["q_turned"][kv, head * rows : (head + 1) * rows] = (q * LANES**-0.5 * LOG2_E).astype(dtype)
        for kv, part in parts:
            m = jnp.max(scores(kv, part, slice(0, LANES), ahead(part)), axis=1, keepdims=True)
            ref["m"][kv, part] = jnp.broadcast_to(m, (part.stop - part.start, LANES))
            for name in ("l", "o_sum"):
                ref[name][here, kv, part] = jnp.zeros_like(ref[name][here, kv, part])

    def meet():
        worst = jnp.zeros((1, LANES), jnp.float32)
        for kv, part in parts:
            behind, sums = ahead(part), []
            m = jnp.concatenate([ref["m"][kv, part]] * (blocks.matmul // LANES), axis=1)
            for c in range(0, blocks.keys, blocks.matmul):
                keys = slice(c, c + blocks.matmul)
                p = jnp.exp2(scores(kv, part, keys, behind) - m)
                sums.append((lane_sums(p), dot(p.astype(dtype), ref["v"][kv, keys], _NN)))
            l, o = (functools.reduce(jnp.add, each) for each in zip(*sums, strict=True))
            l = ref["l"][here, kv, part] + l
            ref["l"][there, kv, part], ref["o_sum"][there, kv, part] = l, ref["o_sum"][here, kv, part] + o
            worst = jnp.maximum(worst, jnp.max(l, axis=0, keepdims=True))
        ref["again"][0] = jnp.where(jnp.max(worst) < _SAFE, 0, 1)

    def running():
        """The step again, with a running maximum."""
        for kv, part in parts:
            m, l, o = ref["m"][kv, part][:, :1], ref["l"][here, kv, part], ref["o_sum"][here, kv, part]
            for c in range(0, blocks.keys, blocks.matmul):
                keys = slice(c, c + blocks.matmul)
                s = scores(kv, part, keys, ahead(part))
                top = jnp.maximum(m, jnp.max(s, axis=1, keepdims=True))
                fade, p = jnp.exp2(m - top), jnp.exp2(s - top)
                m, l = top, l * fade + lane_sums(p)
                o = o * fade + dot(p.astype(dtype), ref["v"][kv, keys], _NN)
            ref["m"][kv, part] = jnp.broadcast_to(m, l.shape)
            ref["l"][there, kv, part], ref["o_sum"][there, kv, part] = l, o

    def put():
        group = stacked // rows
        for kv in range(blocks.kv_heads):
            for head in range(group):
                part, lanes = slice(head * rows, (head + 1) * rows), (kv * group + head) * LANES
                l = jnp.sum(ref["l"][there, kv, part], axis=1, keepdims=True)
                o = jnp.where(tokens(part) < real, ref["o_sum"][there, kv, part] / l, 0.0)
                ref["o"][:, lanes : lanes + LANES] = o[: ref["o"].shape[0]].astype(ref["o"].dtype)

    reached = (real > 0) & (at <= last)
    pl.when(reached & (at == 0))(begin)
    pl.when(reached)(meet)

    pl.when(reached & (ref["again"][0] == 1))(running)
    pl.when(reached & (at == last))(put)

    @pl.when((real <= 0) & (at == 0))
    def _():
        ref["o"][...] = jnp.zeros_like(ref["o"])


def forward(arrays: dict[str, jax.Array], *, heads: int, blocks: Blocks, chip: str, interpret: bool) -> jax.Array:
    """o [B, T, H*128]; T is one, or whole blocks.

    arrays: q [B, T, H*128], k, v [L, B, K, S, 128]; table [B, T, 128] fp32, cos and sin of each pair; int32 layer [1],
    start and count [B].
    """
    q, k = arrays["q"], arrays["k"]
    (batch, length, _), kv_heads, many = q.shape, k.shape[2], blocks.kv_heads
    group, rows = heads // kv_heads, min(blocks.rows, length)
    of_row = length // rows
    last = functools.partial(last_block, rows=blocks.rows, keys=blocks.keys)
    longest = last(arrays["start"], arrays["count"], length).max() + 1

    def queries(h, i, j, *_):
        return i // of_row, i % of_row, h

    def keys(h, i, j, layer, start, count):
        row = i // of_row
        return layer[0], row, h, jnp.minimum(j, last(start[row], count[row], i % of_row * blocks.rows)), 0

    layout = {
        "q": pl.BlockSpec((None, rows, many * group * LANES), queries),
        "k": pl.BlockSpec((None, None, many, blocks.keys, LANES), keys),
        "v": pl.BlockSpec((None, None, many, blocks.keys, LANES), keys),
        "table": pl.BlockSpec((None, rows, LANES), lambda h, i, j, *_: (i // of_row, i % of_row, 0)),
    }
    inputs = [name for name in layout if name in arrays]
    stacked = (many, group * blocks.rows, LANES)
    scratch = {
        "q_turned": pltpu.VMEM(stacked, q.dtype),
        "m": pltpu.VMEM(stacked, jnp.float32),
        "l": pltpu.VMEM((2, *stacked), jnp.float32),  # before and after a step
        "o_sum": pltpu.VMEM((2, *stacked), jnp.float32),
        "again": pltpu.SMEM((1,), jnp.int32),
    }
    # no more than that: what else stands in VMEM, as weights that are read ahead, has to leave it
    needed = 8 * LANES * many * (group * blocks.rows * 4 + blocks.keys * q.dtype.itemsize) + SPILLS
    scalars = ("layer", "start", "count")
    names = (*scalars, *inputs, "o", *scratch)
    return pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, names=names, of_row=of_row),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(kv_heads // many, batch * of_row, longest),
            in_specs=[layout[name] for name in inputs],
            out_specs=layout["q"],
            scratch_shapes=list(scratch.values()),
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=min(needed, VMEM_LIMIT[chip])
        ),
        interpret=interpret,
        name="cached_attention",
    )(*(arrays[name] for name in (*scalars, *inputs)))
