"""Ratios on a CPU of models: generation with a cache, scanned layers, what memories cost, and rollouts."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.measure import RUNS, Row, in_turns, packed_batch, unrolled
from benchmarks.models import deep, make, wide
from vlmem_jax.data import DataConfig
from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.generate.rows import Plan, Programs, compiled, prompt_text, settings
from vlmem_jax.generate.rows import Row as Rows
from vlmem_jax.generate.sampling import GREEDY
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import decode_flops, formation_flops
from vlmem_jax.rl import GRPOLoss, RLConfig
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.rollout import rollout_keys, rollouts
from vlmem_jax.rl.rows import RowShape, pack_steps
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.types import Batch, Sample


def train_step(vlm: VLM):
    """Forward and backward pass, not yet compiled."""
    return jax.jit(jax.value_and_grad(lambda params, batch: vlm.hidden(params, batch).astype(jnp.float32).var()))


# --- generation -------------------------------------------------------------------------------------------------------


def start(vlm: VLM, params: dict, batch: Batch, capacity: int) -> tuple[Generator, Programs, Row]:
    """A generator, the programs of an engine, and its rows after each has read one of `batch`."""
    generator = Generator(vlm, params, stop_ids=[], mesh=make_mesh(MeshConfig()))
    rows, tokens = batch.text.tokens_BT.shape
    shape = PoolShape(rows, capacity, tokens, batch.views.pixels_BISSc.shape[1])
    programs = compiled(vlm, generator.mesh, shape, vlm.tile)
    own = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), settings(vlm, shape))
    with generator.context():
        batch = jax.device_put(batch)
        visual = programs.see(params, batch.views) if shape.tiles else None
        logits_BV, decode = programs.first(params, prompt_text(batch.text), visual, np.full(rows, tokens, np.int32))
    return generator, programs, Rows(decode, logits_BV, *generator.put((*own, np.ones(rows, bool)), rows=True))


def stepping(generator: Generator, programs: Programs, used: int) -> Callable[[Rows], Rows]:
    """A greedy token for each row; they are donated, and fill so many slots of their caches."""
    nothing_V, plan = np.zeros(generator.vlm.config.decoder.vocab, bool), Plan(np.int32(GREEDY), np.int32(used))
    given = generator.put((nothing_V, plan))

    def step(rows: Rows) -> Rows:
        with generator.context():
            return programs.step(generator.params, rows, *given)[0]

    return step


def decode_step(layers=24, slots=2048, calls=50, runs=RUNS) -> list[Row]:
    """What the host spends on a token, and whether the program copies its cache."""
    vlm, params = make(deep(layers))
    generator, programs, rows = start(vlm, params, packed_batch(vlm, 1, 64, 2), slots)
    nothing_V = np.zeros(vlm.config.decoder.vocab, bool)
    with generator.context():
        program = programs.step.lower(params, rows, nothing_V, Plan(np.int32(GREEDY), np.int32(slots))).compile()
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(rows.decode) if leaf.nbytes > 2**16}
    lines = program.as_text().splitlines()
    copies = sum(" copy" in line and any(f"[{shape}]" in line for shape in shapes) for line in lines)
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(rows.decode))
    temporary, step = program.memory_analysis().temp_size_in_bytes / state, stepping(generator, programs, slots)

    def dispatch() -> float:
        nonlocal rows
        jax.block_until_ready(rows)
        begin = time.perf_counter()
        rows = step(rows)
        return (time.perf_counter() - begin) * 1e3

    dispatch()
    medians = [statistics.median(dispatch() for _ in range(calls)) for _ in range(runs)]
    dispatched = f"host dispatch of a decoding step, {layers} layers of tiny width"
    how = f"compiled HLO, {slots} slots; all temporaries are {temporary:.1%} of the state"
    return [
        Row(dispatched, medians, 0.3, True, "ms", f"until the call returns; {calls} calls"),
        Row("copies of KV cache or memory in the compiled decoding step", [float(copies)], 0, True, "", how),
    ]


def cached_generation(prompts=(128, 1024), **sizes) -> list[Row]:
    """256 tokens with the cache, against reading everything again for each."""
    return [cached_after(prompt, **sizes) for prompt in prompts]


def cached_after(prompt: int, layers=8, width=256, new=256, stride=16, runs=7) -> Row:
    """The same after a prompt of so many tokens; one image with its thumbnail takes 512 to 3328."""
    vlm, params = make(wide(layers, width))
    batch = packed_batch(vlm, 1, prompt + new, 4)
    head = jax.jit(lambda params, batch: vlm.hidden(params, batch)[:, -1] @ vlm.head_kernel(params).astype(vlm.dtype))

    def cut(tokens: int):
        return jax.device_put(dataclasses.replace(batch, text=jax.tree.map(lambda x: x[:, :tokens], batch.text)))

    lengths = [-(-(prompt + n) // 64) * 64 for n in range(0, new, stride)]
    batches = {length: cut(length) for length in lengths}
    begin = cut(prompt)

    def cached():
        generator, programs, rows = start(vlm, params, begin, prompt + new)
        step = stepping(generator, programs, prompt + new)
        for _ in range(new):
            rows = step(rows)
        return rows.logits_BV

    def again():
        return [jax.block_until_ready(head(params, batches[length])) for length in lengths]

    cached(), again()
    seconds = in_turns(cached, again, runs=runs)
    ratios = stride * seconds[:, 1] / seconds[:, 0]
    how = f"{layers} layers of width {width}; re-forwarding in steps of 64, every {stride}th token timed"
    what = f"{new} tokens with the cache against re-forwarding, after a prompt of {prompt} tokens"
    return Row(what, ratios.tolist(), 10, False, "x", how)


# --- training ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Without the cache on disk: compile times are measured."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        _use_cache(False)
        yield
    finally:
        _use_cache(enabled)


def _use_cache(use: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", use)
    compilation_cache.reset_cache()  # which looks at the setting once


def scanned_layers(layers=24, tokens=512, builds=7, runs=RUNS) -> list[Row]:
    """Layers as one scanned program, against the same code unrolled."""
    vlm, params = make(wide(layers, width=128))
    batch = jax.device_put(packed_batch(vlm, 1, tokens, 4))
    programs = {}

    def compiled(name: str) -> None:
        with unrolled() if name == "unrolled" else contextlib.nullcontext():
            programs[name] = train_step(vlm).lower(params, batch).compile()

    with compiled_anew():
        build = in_turns(lambda: compiled("scanned"), lambda: compiled("unrolled"), runs=builds)
    calls = [lambda program=program: program(params, batch) for program in programs.values()]
    for call in calls:
        call()
    run = in_turns(*calls, runs=runs)
    what, how = "scanned against unrolled layers", f"training step of {tokens} tokens, remat={vlm.config.remat}"
    compiling = f"{what}: trace and compile ({layers} layers of width 128)"
    return [
        Row(compiling, (build[:, 0] / build[:, 1]).tolist(), 0.7, True, "x", how),
        Row(f"{what}: run", (run[:, 0] / run[:, 1]).tolist(), 1.25, True, "x", how),
    ]


def memory_overhead(layers=8, width=256, tokens=512, runs=RUNS) -> list[Row]:
    """Time that the memory costs, beyond the share of its FLOPs."""
    made = {memory: wide(layers, width, memory=memory) for memory in ("comemo", "none")}
    return [overhead("memory on against off", 1.3, *made.values(), tokens, 8, runs)]


def kept_frames(layers=4, width=256, tower=128, tokens=512, frames=16, runs=RUNS) -> list[Row]:
    """Time that a memory of frames costs, beyond the share of its FLOPs, where it keeps fewer than a clip has."""
    vision = dict(width=tower, heads=4, mlp_width=4 * tower)
    kept = dict(kind="vlm2", geometry_width=0, working=frames // 4, episodic=frames // 2, heads=2)
    on, off = (wide(layers, width, vision=vision, memory=memory) for memory in (kept, "none"))
    return [overhead("frames kept against not kept", 1.25, on, off, tokens, frames, runs)]


def overhead(what: str, goal: float, on: dict, off: dict, tokens: int, tiles: int, runs: int) -> Row:
    """Ratio of the times of a training step of two models, over that of their FLOPs."""
    calls, flops = [], []
    for config in (on, off):
        vlm, params = make(config)
        batch = jax.device_put(packed_batch(vlm, 1, tokens, tiles))
        with unrolled():  # a scan's body counts once, however often it runs
            flops.append(train_step(vlm).lower(params, batch).cost_analysis()["flops"])
        step = train_step(vlm)
        calls.append(lambda step=step, params=params, batch=batch: step(params, batch))
        calls[-1]()
    seconds = in_turns(*calls, runs=runs)
    time_ratio, flop_ratio = seconds[:, 0] / seconds[:, 1], flops[0] / flops[1]
    how = (
        f"training step, {vlm.config.decoder.layers} layers of width {vlm.config.decoder.width}, {tokens} tokens, "
        f"{tiles} tiles: "
        f"time {np.median(time_ratio):.3g} x, FLOPs {flop_ratio:.3g} x"
    )
    return Row(f"{what}: time ratio / FLOP ratio", (time_ratio / flop_ratio).tolist(), goal, True, "x", how)


# --- reinforcement and memories that speak ---------------------------------------------------------------------------


def shared_prefill(group=8, count=2, tokens=512, new=16, layers=4, width=256, runs=RUNS) -> list[Row]:
    """A phase of GRPO whose prompts are read once for a group, against reading them for each answer."""
    vlm, params = make(wide(layers, width, memory=None))
    batch = packed_batch(vlm, count, tokens, 8)
    prompts = [
        Sample(
            tokens_T=batch.text.tokens_BT[n],
            labels_T=np.full_like(batch.text.tokens_BT[n], -100),
            positions_T=np.array(batch.text.positions_BT[n]),
            visual_index_T=np.array(batch.text.visual_index_BT[n]),
            pixels_ISSc=batch.views.pixels_BISSc[n],
            visual_positions_M=np.array(batch.views.positions_BM[n]),
        )
        for n in range(count)
    ]
    generator = Generator(vlm, params, stop_ids=[])
    sampling, keys_PG = SamplingConfig(new, temperature=1.0), rollout_keys(0, 0, 0, count, group)
    each = [prompt for prompt in prompts for _ in range(group)]
    data = DataConfig(pack_tokens=tokens + 128, pack_tiles=8, loss_weight="sample")
    loss = GRPOLoss(vlm, RLConfig(), 256, ())

    def sample(prompts: list[Sample], keys: jax.Array) -> list[Step]:
        return [t for _, drawn in rollouts(generator, prompts, sampling, keys, count * group) for t in drawn]

    learn = jax.jit(jax.grad(lambda params, rows: loss.loss(params, rows, None)[0]))

    def update(steps: list[Step]) -> list[dict]:
        parts = pack_steps(steps, [1.0] * len(steps), data, vlm, RowShape.of(data, vlm, new), at_once=4)
        return [learn(params, part) for part in parts]

    keys_E1 = keys_PG.reshape(-1, 1)
    once, apart = functools.partial(sample, prompts, keys_PG), functools.partial(sample, each, keys_E1)
    steps = once()
    apart(), jax.block_until_ready(update(steps))
    seconds = in_turns(once, apart, lambda: update(steps), runs=runs)
    what = f"rollouts of GRPO, groups of {group} answers of {new} tokens: prompts of {tokens} tokens"
    together = "the same, of a whole step: rollouts and the update, which reads each prompt once"
    whole = (seconds[:, 1] + seconds[:, 2]) / (seconds[:, 0] + seconds[:, 2])
    phase, how = list(seconds[:, 1] / seconds[:, 0]), f"{count} prompts with 8 tiles"
    return [
        Row(f"{what} read for each answer / once", phase, 2, False, "x", how),
        Row(together, list(whole), None, False, "x", how),
    ]


def forming(rows=8, states=192, tokens=256, layers=8, width=256, runs=RUNS) -> list[Row]:
    """A memory formed and inserted, against decoding as many tokens, by what either takes of FLOPs."""
    decoder = wide(layers, width)["decoder"] | {"rope_sections": (8, 12, 12)}
    vismem = dict(kind="vismem", short_len=8, long_len=16, query_len=8, max_prompt_hidden=states, max_positions=1024)
    vlm, params = make({"preset": "tiny_qwen2_5_vl", "memory": vismem, "decoder": decoder})
    speech = vlm.speech
    empty = Batch.empty((rows,), tokens, 0, vlm.tile)
    index = np.broadcast_to(np.arange(tokens, dtype=np.int32)[:, None], (rows, tokens, 3))
    batch = empty.replace(segments_BT=np.ones_like(empty.text.segments_BT), positions_BT=np.array(index))
    generator, programs, state = start(vlm, params, batch, 1024)
    longest, used = speech.latents + 1, np.int32(1024)
    step = stepping(generator, programs, 1024)
    latents_BND = jnp.zeros((rows, speech.latents, width), vlm.dtype)
    rows_R, kinds_B = np.arange(rows, dtype=np.int32), np.ones(rows, np.int32)

    def spoken() -> jax.Array:
        nonlocal state, latents_BND
        with generator.context():
            latents_BND, _ = programs.form(params, state.decode, latents_BND, rows_R, kinds_B, states)
            state = programs.insert(params, state, latents_BND, kinds_B, used)
        return state.logits_BV

    def plain() -> jax.Array:
        nonlocal state
        for _ in range(longest):
            state = step(state)
        return state.logits_BV

    jax.block_until_ready(spoken())  # each takes the arrays that the other gave
    jax.block_until_ready(plain())
    seconds = in_turns(spoken, plain, runs=runs)
    per_token = decode_flops(vlm.config, 1, tokens, 0)
    heard = formation_flops(vlm.config, states, trained=())
    ratio = (heard + longest * per_token) / (longest * per_token)
    values = list(seconds[:, 0] / seconds[:, 1] / ratio)
    how = f"{rows} rows, {speech.latents} latent tokens, FLOP ratio {ratio:.3g}"
    formed = f"a memory of VisMem formed from {states} states and inserted"
    return [Row(f"{formed} / {longest} tokens decoded: time ratio / FLOP ratio", values, 1.3, True, "x", how)]
