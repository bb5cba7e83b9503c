"""Forward kernel for TPUs and a memory of few slots: scores are transposed (slots down, queries along the lanes).

Maximum and sum of a query then go down the sublanes, where they need no exchange between lanes; with few slots that
exchange is what binds. All slots are at hand at once, so that the maximum is exact. A grid step holds several heads.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import rotary
from kernels_pallas.lanes import LANES, NEVER, VMEM_LIMIT, column, dots
from kernels_pallas.memory_attention import blocks as block_sizes
from kernels_pallas.memory_attention.tpu_forward import Spec, transposed_mask

AHEAD = 1
_NT = (((1,), (1,)), ((), ()))
_TN = (((0,), (0,)), ((), ()))


def _kernel(*refs, spec: Spec, blocks: block_sizes.Small, names: tuple[str, ...], group: int):
    ref = dict(zip(names, refs, strict=True))
    dtype = ref["q"].dtype
    dot = dots(dtype)
    q_rows, num_slots = ref["q"].shape[0], ref["k"].shape[0]

    def tables(side, rows):
        if spec.rotation == "positions":
            return rotary.tables_in_kernel(column(ref[f"{side}_pos"][:, rows]), ref["angles"][...])
        return ref[f"{side}_cos"][rows], ref[f"{side}_sin"][rows]

    k_tables = None if spec.k_rotated else tables("k", pl.ds(0, num_slots))
    k_segments = column(ref["k_segments"][...]) if spec.segments else None
    keys = {}

    def scores(r, h):
        """[slots, rows] of head h, in powers of two."""
        here, kv = pl.ds(r, blocks.rows), h // group
        if kv not in keys:
            k = ref["k"][:, pl.ds(kv * LANES, LANES)]
            keys[kv] = k if spec.k_rotated else rotary.turned(k, *k_tables).astype(dtype)
        q = ref["q"][here, pl.ds(h * LANES, LANES)].astype(jnp.float32)
        q = q if spec.rotation == "none" else rotary.turned(q, *tables("q", here))
        return dot(keys[kv], (q * spec.scale).astype(dtype), _NT)

    def finish(r, h, s):
        here = pl.ds(r, blocks.rows)
        if spec.masked:
            rows = {kind: ref[f"q_{kind}"][:, here] for kind in ("segments", "limit") if f"q_{kind}" in ref}
            s = jnp.where(transposed_mask(spec, k_segments, rows, 0, num_slots), s, NEVER)
        m = jnp.max(s, axis=0, keepdims=True)
        p = jnp.exp2(s - m)
        l = jnp.sum(p, axis=0, keepdims=True)
        inverse, log = 1 / l, m + jnp.log2(l)
        if spec.masked:
            inverse, log = jnp.where(m > NEVER / 2, inverse, 0.0), jnp.where(m > NEVER / 2, log, -NEVER)
        o = dot(p.astype(dtype), ref["v"][:, pl.ds(h // group * LANES, LANES)], _TN) * column(inverse)
        ref["o"][here, pl.ds(h * LANES, LANES)] = o.astype(ref["o"].dtype)
        ref["lse"][h, :, here] = log

    tasks = [(r, h) for r in range(0, q_rows, blocks.rows) for h in range(blocks.heads)]
    waiting = []
    for task in tasks:  # scores are asked for ahead of the softmax that uses the units meanwhile
        waiting.append((*task, scores(*task)))
        if len(waiting) > AHEAD:
            finish(*waiting.pop(0))
    for task in waiting:
        finish(*task)


def forward(spec: Spec, arrays: dict[str, jax.Array], *, num_units: int, blocks: block_sizes.Small, cores: int = 1):
    """As `tpu_forward.forward`; heads of a grid step are a multiple or a divisor of the group that shares a kv head."""
    q, k = arrays["q"], arrays["k"]
    (batch, num_queries, _), num_slots = q.shape, k.shape[1]
    group = num_units * LANES // k.shape[2]
    kv_width = max(1, blocks.heads // group)
    shared = max(1, group // blocks.heads)  # grid steps that share a kv head

    def kv_head(h):
        return h // shared

    q_row = pl.BlockSpec((None, 1, blocks.q), lambda b, h, i: (b, 0, i))
    heads = pl.BlockSpec((None, blocks.q, blocks.heads * LANES), lambda b, h, i: (b, i, h))
    kv = pl.BlockSpec((None, num_slots, kv_width * LANES), lambda b, h, i: (b, 0, kv_head(h)))
    q_table = pl.BlockSpec((None, blocks.q, LANES), lambda b, h, i: (b, i, 0))
    k_table = pl.BlockSpec((None, num_slots, LANES), lambda b, h, i: (b, 0, 0))
    k_row = pl.BlockSpec((None, 1, num_slots), lambda b, h, i: (b, 0, 0))
    layout = {
        "q": heads,
        "k": kv,
        "v": kv,
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
    o, lse = pl.pallas_call(
        functools.partial(_kernel, spec=spec, blocks=blocks, names=(*inputs, "o", "lse"), group=group),
        grid=(batch, num_units // blocks.heads, num_queries // blocks.q),
        in_specs=[layout[name] for name in inputs],
        out_specs=[heads, pl.BlockSpec((None, blocks.heads, 1, blocks.q), lambda b, h, i: (b, h, 0, i))],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, num_units, 1, num_queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 3, vmem_limit_bytes=VMEM_LIMIT[spec.chip]
        ),
        interpret=spec.interpret,
        name="memory_attention_forward",
    )(*(arrays[name] for name in inputs))
    return o, lse
