"""TPU backend: pads to whole blocks, splits what VMEM cannot hold, and calls the kernels."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import rotary
from kernels_pallas.lanes import LANES, NEVER, halves, pad_heads, pad_row, unpad_heads, up
from kernels_pallas.memory_attention import blocks as block_sizes
from kernels_pallas.memory_attention import tpu_backward, tpu_forward, tpu_small
from kernels_pallas.memory_attention.blocks import heads_together
from kernels_pallas.memory_attention.problem import Inputs, Problem, reach, spans
from kernels_pallas.memory_attention.tpu_forward import Spec

_LN2 = math.log(2)


def unsupported(problem: Problem, inputs: Inputs) -> str | None:
    """Why this backend cannot serve, or None."""
    width = inputs.q.shape[-1]
    if width > LANES or width % 2:
        return f"head dim must be even and at most {LANES}, got {width}"
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"q must be bfloat16 or float32, got {inputs.q.dtype}"
    return None


def forward(problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, C] and lse [B, H, T] (natural; -inf without memory)."""
    num_slots = inputs.k.shape[1]
    parts = [_forward(problem, inputs.slots(start, start + block_sizes.MAX_SLOTS))
             for start in range(0, num_slots, block_sizes.MAX_SLOTS)]  # fmt: skip
    o, lse = parts[0]
    for other, other_lse in parts[1:]:
        o, lse = merge(o, lse, other, other_lse)
    return o, lse


def merge(o: jax.Array, lse: jax.Array, other: jax.Array, other_lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One softmax out of two over different keys: outputs [B, T, H, C] and log-sum-exps [B, H, T]."""
    both = jnp.logaddexp(lse, other_lse)
    finite = jnp.where(jnp.isfinite(both), both, 0.0)
    first, second = (jnp.exp(x - finite).swapaxes(1, 2)[..., None] for x in (lse, other_lse))
    return (o * first + other * second).astype(o.dtype), both


def backward(
    problem: Problem, inputs: Inputs, o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and types of q, k, v."""
    inputs = inputs.by_query()
    delta = _products(o.astype(jnp.float32), do.astype(jnp.float32), _side_by_side(inputs))
    if dlse is not None:
        delta -= dlse
    log2 = jnp.where(jnp.isfinite(lse), lse / _LN2, -NEVER)
    num_queries, num_slots = inputs.q.shape[1], inputs.k.shape[1]
    group = inputs.q.shape[2] // inputs.k.shape[2]
    q_step = max(512, block_sizes.MAX_QUERIES // group // 2048 * 2048)
    dq, dk, dv = [], [], []
    for m in range(0, num_slots, block_sizes.MAX_SLOTS):
        columns = []
        for t in range(0, num_queries, q_step):
            rows = slice(t, t + q_step)
            some = inputs.slots(m, m + block_sizes.MAX_SLOTS).queries(t, t + q_step)
            columns.append(_backward(problem, some, log2[..., rows], delta[..., rows], do[:, rows]))
        dq.append(jnp.concatenate([c[0] for c in columns], axis=1))
        dk.append(_total([c[1] for c in columns]))
        dv.append(_total([c[2] for c in columns]))
    return _total(dq), jnp.concatenate(dk, axis=1), jnp.concatenate(dv, axis=1)


def _total(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else sum(p.astype(jnp.float32) for p in parts).astype(parts[0].dtype)


def _forward(problem: Problem, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    (batch, num_queries, heads, width), (kv_heads, num_slots) = inputs.q.shape, (inputs.k.shape[2], inputs.k.shape[1])
    group = heads // kv_heads
    folded = group > 1 and num_queries * group <= 16 and isinstance(inputs.q_pos, rotary.Tables | None)
    if folded:  # decoding: the heads that share a kv head are rows of one matmul
        return _unfold(*_forward(problem, _fold(inputs, group)), group)
    together = _side_by_side(inputs)
    if num_slots <= block_sizes.SMALL_SLOTS and num_queries > 16 and together == 1:
        kernel, blocks = tpu_small.forward, block_sizes.small(num_queries, heads, group, problem.chip)
    else:
        kernel = tpu_forward.forward
        blocks = block_sizes.forward(num_queries, num_slots, problem.chip, inputs.masked, kv_heads // together)
    spec, arrays = _prepare(problem, inputs, up(num_queries, blocks.q), up(num_slots, LANES), kernel)
    if spec.masked and kernel is tpu_forward.forward:
        chunk = tpu_forward.chunk_width(up(num_slots, LANES), blocks)
        arrays["active"] = spans(_reach(arrays, blocks.q, chunk))
    o, lse = kernel(spec, arrays, num_units=heads // together, blocks=blocks, cores=problem.cores)
    lse = lse[..., :num_queries].reshape(batch, heads, num_queries)
    return _unpad(o, num_queries, width, together), jnp.where(lse == -NEVER, -jnp.inf, lse * _LN2)


def _backward(problem, inputs, log2, delta, do):
    (batch, num_queries, heads, width), num_slots = inputs.q.shape, inputs.k.shape[1]
    units = heads // _side_by_side(inputs)
    blocks = block_sizes.backward(num_queries, num_slots, problem.chip, inputs.masked)
    padded_queries, padded_slots = up(num_queries, blocks.q), up(num_slots, blocks.slots)
    spec, arrays = _prepare(problem, inputs, padded_queries, padded_slots, tpu_backward.backward)
    more = padded_queries - num_queries
    arrays["do"] = _pad(do, padded_queries, spec.heads)
    rows = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (log2, delta))
    arrays["lse"], arrays["delta"] = (x.reshape(batch, units, spec.heads, padded_queries) for x in rows)
    if spec.masked:
        arrays["active"] = _reach(arrays, blocks.rows, blocks.slots).swapaxes(1, 2).astype(jnp.int32)
    dq, dk, dv = tpu_backward.backward(spec, arrays, num_units=units, blocks=blocks, cores=problem.cores)
    sizes = (dq, num_queries), (dk, num_slots), (dv, num_slots)
    return tuple(_unpad(x, rows, width, spec.heads) for x, rows in sizes)


def _side_by_side(inputs: Inputs) -> int:
    """Heads that share the 128 lanes: narrow ones, each with keys of its own, that need no turning."""
    (*_, heads, width), kv_heads = inputs.q.shape, inputs.k.shape[2]
    return 1 if inputs.q_pos is not None or heads != kv_heads else heads_together(heads, width)


def _products(x: jax.Array, y: jax.Array, together: int) -> jax.Array:
    """[B, H, T] of the inner products of x and y [B, T, H, C], in fp32."""
    if together == 1:
        return jnp.einsum("bthc,bthc->bht", x, y)
    batch, rows, heads, width = x.shape  # narrow heads stay as they lie: apart, each would be padded to 128 lanes
    belongs = jnp.repeat(jnp.eye(heads, dtype=jnp.float32), width, axis=0)
    flat = x.reshape(batch, rows, -1) * y.reshape(batch, rows, -1)
    return jnp.einsum("bte,eh->bht", flat, belongs, precision=jax.lax.Precision.HIGHEST)


def _fold(inputs: Inputs, group: int) -> Inputs:
    batch, num_queries, heads, width = inputs.q.shape
    q = inputs.q.reshape(batch, num_queries, heads // group, group, width).swapaxes(2, 3)
    repeat = lambda x: None if x is None else jnp.repeat(x, group, axis=1)  # noqa: E731 - a name for a tree map
    return inputs._replace(
        q=q.reshape(batch, num_queries * group, heads // group, width),
        q_pos=jax.tree.map(repeat, inputs.q_pos),
        q_segments=repeat(inputs.q_segments),
        limit=repeat(inputs.limit),
    )


def _unfold(o: jax.Array, lse: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    batch, rows, kv_heads, width = o.shape
    o = o.reshape(batch, rows // group, group, kv_heads, width).swapaxes(2, 3)
    lse = lse.reshape(batch, kv_heads, rows // group, group).swapaxes(2, 3)
    return o.reshape(batch, rows // group, kv_heads * group, width), lse.reshape(batch, kv_heads * group, -1)


def _pad(x: jax.Array, rows: int, together: int) -> jax.Array:
    """[B, N, H, C] to [B, rows, H*128], or to [B, rows, H*C] where heads share lanes."""
    if together == 1:
        return pad_heads(x, rows)
    return jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), (0, rows - x.shape[1]), (0, 0)))


def _unpad(x: jax.Array, rows: int, width: int, together: int) -> jax.Array:
    """The other way."""
    if together == 1:
        return unpad_heads(x, rows, width)
    return x[:, :rows].reshape(x.shape[0], rows, -1, width)


def _prepare(
    problem: Problem, inputs: Inputs, num_queries: int, num_slots: int, kernel: Callable
) -> tuple[Spec, dict[str, jax.Array]]:
    """The kernel's arrays, padded, with rows that have no memory marked by segment -1 or limit 0."""
    if num_slots > inputs.k.shape[1] and not inputs.masked and inputs.num_valid is None:
        inputs = inputs._replace(num_valid=jnp.full(inputs.q.shape[0], inputs.k.shape[1], jnp.int32))
    if kernel is not tpu_forward.forward or inputs.masked:
        inputs = inputs.by_query()
    q, k, v = inputs.q, inputs.k, inputs.v
    width, together = q.shape[-1], _side_by_side(inputs)
    arrays = {"q": _pad(q, num_queries, together)}
    arrays |= {name: _pad(x, num_slots, together) for name, x in (("k", k), ("v", v))}
    limit, some = inputs.limit, inputs.has_memory() if inputs.masked else None
    if inputs.k_segments is not None:
        arrays["q_segments"] = pad_row(jnp.where(some, inputs.q_segments, -1), num_queries, -1)
        arrays["k_segments"] = pad_row(jnp.where(inputs.k_segments > 0, inputs.k_segments, -2), num_slots, -2)
    if limit is not None:
        limit = limit if some is None else jnp.where(some, limit, 0)
        arrays["q_limit"] = pad_row(limit, num_queries, 0)
    if inputs.num_valid is not None:
        arrays["valid"] = inputs.num_valid.astype(jnp.int32)
    rotation = "none"
    if inputs.q_pos is not None:
        rotation = "tables" if isinstance(inputs.q_pos, rotary.Tables) else "positions"
        for side, pos, rows in (("q", inputs.q_pos, num_queries), ("k", inputs.k_pos, num_slots)):
            if pos is None:
                continue
            if rotation == "tables":
                tables = [jnp.pad(halves(t), ((0, 0), (0, rows - t.shape[1]), (0, 0))) for t in pos]
                arrays[f"{side}_cos"], arrays[f"{side}_sin"] = tables
            else:
                arrays[f"{side}_pos"] = pad_row(pos, rows, 0)
        if rotation == "positions":
            arrays["angles"] = jnp.asarray(rotary.angle_row(width, LANES, problem.theta))
    spec = Spec(
        head_dim=width,
        theta=problem.theta,
        rotation=rotation,
        heads=together,
        k_rotated=inputs.k_pos is None,
        segments="q_segments" in arrays,
        limit="q_limit" in arrays,
        valid="valid" in arrays,
        chip=problem.chip,
        interpret=problem.interpret,
    )
    return spec, arrays


def _reach(arrays: dict[str, jax.Array], rows: int, width: int) -> jax.Array:
    """`problem.reach` of padded arrays."""
    q_segments, k_segments, limit = (
        arrays[name][:, 0] if name in arrays else None for name in ("q_segments", "k_segments", "q_limit")
    )
    return reach(q_segments, k_segments, limit, arrays["k"].shape[1], rows, width)
