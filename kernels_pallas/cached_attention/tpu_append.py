"""Kernel for TPUs that puts new keys and values into a cache, in place: XLA's scatter would turn the whole cache round,
so that slots no longer stand next to the numbers of a head.

Memory is written by tiles, so that a grid step reads a window of slots that stands at a multiple of its size, puts the
tokens there that fall into it, and writes it back.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.cached_attention.blocks import SPILLS
from kernels_pallas.lanes import LANES, VMEM_LIMIT


def _last_window(start, count, window: int):
    """Of those that a row's tokens fall into, counted from the first; 0 without tokens."""
    return jnp.maximum(start % window + count - 1, 0) // window


def _kernel(layer, start, count, *refs, window: int, names: tuple[str, ...]):
    ref = dict(zip(names, refs, strict=True))
    row, at = pl.program_id(0), pl.program_id(1)
    into = start[row] % window

    @pl.when(at <= _last_window(start[row], count[row], window))
    def _():
        slot = jax.lax.broadcasted_iota(jnp.int32, (window, LANES), 0)
        token = slot + at * window - into
        here = (token >= 0) & (token < count[row])
        for x in "kv":
            for head in range(ref[x].shape[0]):
                lanes = slice(head * LANES, (head + 1) * LANES)
                before, new = (ref[f"{x}_{which}"][:, lanes].astype(jnp.float32) for which in ("before", "new"))
                if new.shape[0] == 1:
                    new = jnp.broadcast_to(new, (window, LANES))
                else:  # tokens of two blocks fall into a window, unless it is the first
                    new = pltpu.roll(jnp.concatenate([before, new]), into, 0)[window:]
                old = ref[x][head]
                ref[f"{x}_out"][head] = jnp.where(here, new, old.astype(jnp.float32)).astype(old.dtype)


def append(arrays: dict[str, jax.Array], window: int, chip: str, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """The cache's k and v, of arrays: k, v [L, B, K, S, 128], k_new, v_new [B, T, K*128], T one or whole windows; int32
    layer [1], start and count [B]."""
    cache, new = arrays["k"], arrays["k_new"]
    (_, batch, kv_heads, _, _), length = cache.shape, new.shape[1]
    rows = min(window, length)

    def slots(b, j, layer, start, count):
        last = _last_window(start[b], count[b], window)
        first = jnp.minimum(start[b], cache.shape[3] - 1) // window
        return layer[0], b, 0, first + jnp.minimum(j, last), 0

    def tokens(back, b, j, *_):
        return b, jnp.clip(j - back, 0, length // rows - 1), 0

    cached = pl.BlockSpec((None, None, kv_heads, window, LANES), slots)
    before, own = (pl.BlockSpec((None, rows, kv_heads * LANES), functools.partial(tokens, back)) for back in (1, 0))
    names = ("k_before", "k_new", "v_before", "v_new", "k", "v", "k_out", "v_out")
    needed = 20 * kv_heads * window * LANES * cache.dtype.itemsize + SPILLS // 4
    scalars = [arrays[name] for name in ("layer", "start", "count")]
    inputs = [arrays[name] for name in ("k_new", "k_new", "v_new", "v_new", "k", "v")]
    return pl.pallas_call(
        functools.partial(_kernel, window=window, names=names),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, 1 if length == 1 else length // window + 1),
            in_specs=[before, own, before, own, cached, cached],
            out_specs=[cached, cached],
        ),
        out_shape=[jax.ShapeDtypeStruct(cache.shape, cache.dtype)] * 2,
        input_output_aliases={len(scalars) + 4: 0, len(scalars) + 5: 1},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=min(needed, VMEM_LIMIT[chip])
        ),
        interpret=interpret,
        name="append_to_cache",
    )(*scalars, *inputs)
