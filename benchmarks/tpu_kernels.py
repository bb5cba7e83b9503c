"""The kernels that `tpu_static` compiles, and how often each conditional part of their code runs."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.tpu_dump import Program, Span
from kernels_pallas import rotary
from kernels_pallas.memory_attention import blocks as block_sizes
from kernels_pallas.memory_attention import tpu, tpu_backward, tpu_forward, tpu_small
from kernels_pallas.memory_attention.blocks import LANES
from kernels_pallas.memory_attention.problem import Inputs, Problem

MATMULS = {"forward": 2, "backward": 5, "decode": 2}
"""Useful matmuls of queries by slots by head dim."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size on one chip."""

    kernel: str = "memory_attention"
    """Or "splash", "flash"."""
    direction: str = "forward"
    chip: str = "v5e"
    batch: int = 1
    queries: int = 2048
    slots: int = 4096
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"
    rotation: str = "tables"
    """Or "positions", "none"."""
    segments: bool = False
    valid: bool = False
    """Whether a number tells how many slots are in use, as of a bank that fills."""
    blocks: tuple[int, ...] = ()
    """Empty: those of the table. memory_attention: the fields of its Forward, Small or Backward; splash and flash:
    rows of q, slots, and slots of a matmul."""

    @property
    def size(self) -> str:
        """Number of slots, and what else is out of the ordinary."""
        extra = [f"{self.slots}"]
        extra += ["counted"] * self.valid
        extra += ["segments"] * self.segments + ["positions"] * (self.rotation == "positions")
        extra += [f"{self.kv_heads} kv heads"] * (self.kv_heads < self.heads)
        extra += [f"head dim {self.head_dim}"] * (self.head_dim != LANES)
        extra += ["not turned"] * (self.kernel == "memory_attention" and self.rotation == "none")
        extra += ["fp32"] * (self.dtype == "float32")
        return ", ".join(extra)

    @property
    def cores(self) -> int:
        return block_sizes.CORES[self.chip]

    @property
    def busy(self) -> int:
        """Cores that take part: heads, queries or rows of the batch go round, or one core does it all."""
        sharing = [self.batch, self.kv_heads // self.together]
        if self.kernel == "memory_attention" and not self.small and self.direction != "backward":
            sharing.append(-(-self.queries // self.chosen[0]))
        return self.cores if any(count % self.cores == 0 for count in sharing) else 1

    @property
    def flops(self) -> float:
        """Useful matmul operations; padding of head_dim is not counted."""
        pairs = self.batch * self.heads * self.queries * self.slots
        return 2.0 * pairs * self.head_dim * MATMULS[self.direction]

    @property
    def minimum_bytes(self) -> int:
        """Each of q, k, v, o (and their gradients) over HBM once."""
        width = jnp.dtype(self.dtype).itemsize * self.batch * self.head_dim
        q, kv = width * self.queries * self.heads, width * self.slots * self.kv_heads
        return 3 * q + 4 * kv if self.direction == "backward" else 2 * q + 2 * kv

    @property
    def chosen(self) -> tuple[int, ...]:
        if self.blocks:
            return self.blocks
        if self.kernel == "memory_attention":
            if self.small:
                group = self.heads // self.kv_heads
                return dataclasses.astuple(block_sizes.small(self.queries, self.heads, group, self.chip))
            if self.direction == "backward":
                partly = self.segments or self.valid
                return dataclasses.astuple(block_sizes.backward(self.queries, self.slots, self.chip, partly))
            units = self.kv_heads // self.together
            return dataclasses.astuple(block_sizes.forward(self.queries, self.slots, self.chip, self.segments, units))
        return min(1024, self.queries), self.slots, min(512, self.slots)

    @property
    def small(self) -> bool:
        """Whether the kernel for few slots serves."""
        return self.direction == "forward" and self.slots <= block_sizes.SMALL_SLOTS and self.together == 1

    @property
    def together(self) -> int:
        """Heads that share the lanes."""
        apart = self.rotation != "none" or self.heads != self.kv_heads
        return 1 if apart else block_sizes.heads_together(self.heads, self.head_dim)

    @property
    def masked(self) -> bool:
        """True where the kernel masks: by segments, or slots that fill up the last block."""
        block = self.chosen[1] if self.direction == "backward" else LANES
        return self.segments or self.valid or self.slots % block > 0

    @property
    def name(self) -> str:
        """Of the kernel in the dumps."""
        if self.kernel == "memory_attention":
            return f"memory_attention_{'backward' if self.direction == 'backward' else 'forward'}"
        phase = "dkv" if self.direction == "backward" else "fwd"
        return {"splash": f"splash_mha_{phase}", "flash": "flash_attention"}[self.kernel]


SPLASH_BLOCKS = {
    ("forward", "256"): (2048, 256, 256),
    ("forward", "1792"): (1024, 1792, 256),
    ("forward", "3328"): (1024, 3328, 256),
    ("forward", "4096"): (1024, 4096, 256),
    ("forward", "4096", "v6e"): (1024, 4096, 512),
    ("forward", "4096, segments"): (1024, 4096, 256),
    ("forward", "4096, segments", "v5e"): (512, 4096, 512),
    ("forward", "12288"): (1024, 2048, 1024),
    ("backward", "4096"): (1024, 2048, 512),
}
"""Blocks at which splash attention is compared: the best of those tried; on one chip alone where it is named."""


def splash_case(case: Case) -> Case:
    """The same work for splash attention, at its best blocks and without rotation."""
    key = (case.direction, case.size)
    best = SPLASH_BLOCKS.get((*key, case.chip), SPLASH_BLOCKS.get(key, ()))
    return dataclasses.replace(case, kernel="splash", rotation="none", blocks=best)


def flash_case(case: Case) -> Case:
    """The same work for flash attention, at the largest blocks up to 1024, and without rotation."""
    kv = max(size for size in range(LANES, 1025, LANES) if case.slots % size == 0)
    return dataclasses.replace(case, kernel="flash", rotation="none", blocks=(min(1024, case.queries), kv, kv))


def build(case: Case):
    """(function, abstract arguments) that holds the kernel and next to nothing else."""
    return {"memory_attention": _memory_attention, "splash": _splash, "flash": _flash}[case.kernel](case)


def _memory_attention(case: Case):
    """The call that the backend makes, with its padding and its blocks, unless the case names others."""
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    q, kv = (array((case.batch, *shape, case.head_dim)) for shape in
             ((case.queries, case.heads), (case.slots, case.kv_heads)))  # fmt: skip
    sizes = {"q": case.queries, "k": case.slots}
    given = {"q": q, "k": kv, "v": kv}
    for side, count in sizes.items():
        if case.rotation == "none" or (side == "k" and case.direction == "decode"):
            continue
        table = jax.ShapeDtypeStruct((case.batch, count, case.head_dim), jnp.float32)
        positions = jax.ShapeDtypeStruct((case.batch, count), jnp.int32)
        given[f"{side}_pos"] = rotary.Tables(table, table) if case.rotation == "tables" else positions
    if case.segments:
        given |= {f"{s}_segments": jax.ShapeDtypeStruct((case.batch, n), jnp.int32) for s, n in sizes.items()}
    if case.valid:
        given["num_valid"] = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
    problem, inputs = Problem(chip=case.chip), Inputs(**given)
    lse = jax.ShapeDtypeStruct((case.batch, case.heads, case.queries), jnp.float32)
    calls = []

    def noted(kernel):
        def call(spec, arrays, **how):
            calls.append((functools.partial(kernel, spec, **how), jax.tree.map(_abstract, arrays)))
            return kernel(spec, arrays, **how)

        return call

    with contextlib.ExitStack() as stack:
        for module, name in ((tpu_forward, "forward"), (tpu_small, "forward"), (tpu_backward, "backward")):
            stack.enter_context(mock.patch.object(module, name, noted(getattr(module, name))))
        if case.blocks:
            kind = "small" if case.small else "backward" if case.direction == "backward" else "forward"
            sizes = getattr(block_sizes, kind.capitalize())(*case.blocks)
            stack.enter_context(mock.patch.object(block_sizes, kind, lambda *_: sizes))
        if case.direction == "backward":
            jax.eval_shape(functools.partial(tpu.backward, problem, dlse=None), inputs, q, lse, q)
        else:
            jax.eval_shape(functools.partial(tpu.forward, problem), inputs)
    ((run, arrays),) = calls
    return run, (arrays,)


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _splash(case: Case):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    q_block, kv_block, compute = case.chosen
    sizes = splash.BlockSizes(
        block_q=q_block, block_kv=kv_block, block_kv_compute=compute, block_q_dkv=q_block, block_kv_dkv=kv_block,
        block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.FullMask((case.queries, case.slots))] * case.heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    q, kv = array((case.heads, case.queries, LANES)), array((case.kv_heads, case.slots, LANES))
    ids = [jax.ShapeDtypeStruct((n,), jnp.int32) for n in (case.queries, case.slots)] if case.segments else []

    def forward(q, k, v, *ids):
        return kernel(q, k, v, segment_ids=splash.SegmentIds(*ids) if ids else None)

    def backward(q, k, v, do, *ids):
        return jax.vjp(lambda *qkv: forward(*qkv, *ids), q, k, v)[1](do)

    return (backward, (q, kv, kv, q, *ids)) if case.direction == "backward" else (forward, (q, kv, kv, *ids))


def _flash(case: Case):
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q_block, kv_block, compute = case.chosen
    sizes = flash.BlockSizes(block_q=q_block, block_k_major=kv_block, block_k=compute, block_b=1)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(case.dtype))
    q, kv = array((1, case.heads, case.queries, LANES)), array((1, case.kv_heads, case.slots, LANES))
    return functools.partial(flash.flash_attention, block_sizes=sizes, sm_scale=LANES**-0.5), (q, kv, kv)


def runs(case: Case, program: Program) -> dict[Span, float]:
    """How often the parts run that do not run at each grid step.

    Raises: ValueError when the code has other conditional parts than these kernels are known to have.
    """
    if case.kernel == "memory_attention" and case.small:
        return {}
    body = max(program.spans, key=lambda s: s.size)
    # one place may be both what a branch jumps over and a loop
    places = {(s.start, s.end): s for s in program.spans if s.size > 40 and s.size < 0.98 * body.size}
    tops = _outermost(places.values())
    if case.kernel != "memory_attention":  # one part does the work, the others open and close a sweep
        sweep = case.queries // case.chosen[0] if case.direction == "backward" else case.slots // case.chosen[1]
        work = max(tops, key=lambda s: s.size, default=None)
        return {s: 1.0 if s is work else 1 / sweep for s in tops}
    if len(tops) == 1 and tops[0].size > body.size / 2:  # the compiler's own branch around the whole step
        tops = _outermost(s for s in places.values() if s is not tops[0])
    times = _times(case)
    if len(times) == len(tops) + 1:  # neighbours with the same condition become one branch
        for i in [i for i in range(1, len(times)) if times[i] == times[i - 1]][:1]:
            del times[i]
    if len(tops) != len(times):
        found = [(s.kind, s.start, s.size) for s in tops]
        raise ValueError(f"{case} has conditional parts {found}, expected {len(times)} of them: {times}")
    return dict(zip(tops, times, strict=True))


def _outermost(spans: Iterable[Span]) -> list[Span]:
    spans = list(spans)
    return [s for s in spans if not any(o is not s and o.start <= s.start and s.end <= o.end for o in spans)]


def _times(case: Case) -> list[float]:
    """Of each conditional part, in the order of the code: how often it runs a grid step."""
    group, blocks = case.heads // case.kv_heads, case.chosen
    heads = case.kv_heads // case.cores if case.kv_heads % case.cores == 0 else case.kv_heads
    if case.direction == "backward":
        q_steps, kv_steps = -(-case.queries // blocks[0]), -(-case.slots // blocks[1])
        kv_once = 1 / (group * q_steps)
        tables = [1 / (heads * kv_steps * group), kv_once / heads] if case.rotation == "positions" else []
        turn_q, put_q = ([1 / kv_steps], [1 / kv_steps]) if kv_steps > 1 else ([], [])
        parts = tables + turn_q
        if case.masked or kv_once < 1:
            # zero the sums and turn k, all queries reach, few do, write the sums
            parts += [kv_once] * (2 if kv_once < 1 else 0)
            parts += [1.0, 0.0] if case.masked else []
            parts += [kv_once] if kv_once < 1 else []
        return parts + put_q
    q_steps = -(-case.queries // blocks[0])
    k_once = 1 / (group * q_steps)
    parts = [1 / (heads * group), k_once / heads] if case.rotation == "positions" else []
    if case.direction != "decode" and case.rotation != "none":
        parts += [k_once] if k_once < 1 else [0.0] if case.masked else []
    return parts + ([1.0] if case.masked else []) + [0.0]
