"""What the design buys, measured on a CPU as ratios of runs that take turns.

    python -m benchmarks.cpu                    # about ten minutes
    python -m benchmarks.cpu --only pipeline --json rows.json
    python -m benchmarks.cpu --toy              # does everything run? The figures mean nothing

Ratios hold on a noisy machine where times do not; still, nothing else should be running.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/cpu.py`

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from benchmarks.engine import cache_use, engine, engine_host
from benchmarks.measure import RUNS, Row, compilations, in_turns, packed_batch, report, unrolled
from benchmarks.models import deep, make, wide
from vlmem_jax.data import DataConfig, Plan, SourceConfig, TrainData
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.generate.invocation import Calls
from vlmem_jax.generate.loop import Generator, compiled_speech
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.generate.sampling import GREEDY, Choice, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import decode_flops, formation_flops
from vlmem_jax.processing import PatchConfig, TileProcessor, Tokenizer, make_processor
from vlmem_jax.processing.images import ImageConfig, open_image, tile_grid
from vlmem_jax.rl import GRPOLoss, RLConfig
from vlmem_jax.rl.rollout import Trajectory, rollout_keys, rollouts
from vlmem_jax.rl.rows import pack_trajectories
from vlmem_jax.runtime.shapes import tile_bucket
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import NextToken
from vlmem_jax.train.run import run as train
from vlmem_jax.trees import State
from vlmem_jax.types import Batch, Sample, Views
from vlmem_jax.vision import VisionConfig


def train_step(vlm: VLM):
    """Forward and backward pass, not yet compiled."""
    return jax.jit(jax.value_and_grad(lambda params, batch: vlm.hidden(params, batch).astype(jnp.float32).var()))


# --- generation -------------------------------------------------------------------------------------------------------


def start(vlm: VLM, params: dict, batch, capacity: int):
    """A generator, and the arguments of its step after reading `batch`."""
    generator = Generator(vlm, params, stop_ids=[], mesh=make_mesh(MeshConfig()))
    rows, vocab = batch.text.tokens_BT.shape[0], vlm.config.decoder.vocab
    with generator.context():
        logits_BV, state = generator.programs.prefill(params, jax.device_put(batch), capacity)
    choice = generator.put(Choice.make(SamplingConfig(), rows, vocab, [], []))
    return generator, state, logits_BV, jnp.zeros(rows, bool), choice


def decode_step(layers=24, slots=2048, calls=50, runs=RUNS) -> list[Row]:
    """What the host spends on a token, and whether the program copies its cache."""
    vlm, params = make(deep(layers))
    generator, state, logits_BV, finished_B, choice = start(vlm, params, packed_batch(vlm, 1, 64, 2), slots)
    with generator.context():
        program = generator.programs.step.lower(
            params, state, logits_BV, finished_B, choice, np.int32(GREEDY)
        ).compile()
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state) if leaf.nbytes > 2**16}
    lines = program.as_text().splitlines()
    copies = sum(" copy" in line and any(f"[{shape}]" in line for shape in shapes) for line in lines)
    temporary = program.memory_analysis().temp_size_in_bytes / sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    def dispatch() -> float:
        nonlocal state, logits_BV, finished_B
        jax.block_until_ready((state, logits_BV, finished_B))
        begin = time.perf_counter()
        with generator.context():
            state, logits_BV, finished_B, *_ = generator.programs.step(
                params, state, logits_BV, finished_B, choice, np.int32(GREEDY)
            )
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
        generator, state, logits_BV, finished_B, choice = start(vlm, params, begin, prompt + new)
        for _ in range(new):
            with generator.context():
                state, logits_BV, finished_B, *_ = generator.programs.step(
                    params, state, logits_BV, finished_B, choice, np.int32(GREEDY)
                )
        return logits_BV

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


# --- streams ----------------------------------------------------------------------------------------------------------


def watching(patches: int, width: int, layers: int) -> tuple[VLM, dict]:
    """A model that keeps frames of so many patches, with banks of as many as the paper's."""
    sizes = dict(layers=layers, width=width, heads=4, mlp_width=4 * width)
    vision = dict(**sizes, image_size=8 * math.isqrt(patches), patch_size=8)
    memory = dict(kind="vlm2", geometry_width=0, working=8, episodic=32, heads=4)
    return make({"preset": "tiny_llava_video", "decoder": {"layers": 1}, "vision": vision, "memory": memory})


def frames_of(vlm: VLM, rows: int) -> Views:
    """A frame of each of so many streams."""
    return jax.device_put(packed_batch(vlm, rows, 2 * vlm.tokens_per_tile, 1).views)


class Streams:
    """Streams of which one frame after the other is taken, by the program `look`."""

    def __init__(self, look: Callable, params: dict, state: State, views: Views):
        self.look, self.params, self.state, self.views = look, params, state, views

    def take(self, count: int) -> State:
        """Takes so many frames more; gives what is kept then."""
        for _ in range(count):
            self.state = self.look(self.params, self.state, self.views)
        return self.state


def streaming(patches=16, width=64, near=100, far=100_000, calls=50, runs=RUNS) -> list[Row]:
    """The next frame of a stream that has gone on for long, against that of a young one."""
    vlm, params = watching(patches, width, layers=1)
    look, views = jax.jit(vlm.look, donate_argnums=1), frames_of(vlm, 1)

    @functools.partial(jax.jit, donate_argnums=1, static_argnums=3)
    def after(params: dict, state: State, views: Views, count: int) -> State:
        """After so many frames, no two of them alike."""

        def step(n: jax.Array, state: State) -> State:
            noise = jax.random.normal(jax.random.key(n), views.pixels_BISSc.shape)
            return vlm.look(params, state, dataclasses.replace(views, pixels_BISSc=noise))

        return jax.lax.fori_loop(0, count, step, state)

    def live() -> int:
        return sum(x.nbytes for x in jax.live_arrays())

    banks = {leaf.shape for leaf in jax.tree.leaves(vlm.watch(params, 1)) if leaf.ndim == 4}
    shapes = [f"[{','.join(map(str, bank))}]" for bank in banks]
    program = look.lower(params, vlm.watch(params, 1), views).compile().as_text()
    copies = sum(" copy(" in line and any(shape in line for shape in shapes) for line in program.splitlines())
    held, streams = [live()], []
    for age in (near, far):
        streams.append(Streams(look, params, after(params, vlm.watch(params, 1), views, age), views))
        jax.block_until_ready(streams[-1].take(2))
        held.append(live())
    young, old = held[1] - held[0], held[2] - held[1]
    turns = [functools.partial(stream.take, calls) for stream in streams]
    with compilations() as seen:
        seconds = in_turns(*turns, runs=runs)
    each, stream = 1e3 * np.median(seconds[:, 1]) / calls, "the next frame of a stream"
    how = f"{patches} patches of width {width}, {each:.3g} ms a frame; {calls} frames a turn"
    return [
        Row(f"{stream}: at frame {far} / at frame {near}", list(seconds[:, 1] / seconds[:, 0]), 1.05, True, "x", how),
        Row(f"{stream}: live bytes at frame {far} that differ from those at {near}", [float(abs(old - young))], 0,
            True, "", f"{old} bytes"),
        Row(f"{stream}: compilations after warm-up", [float(len(seen))], 0, True, "", how),
        Row(f"{stream}: copies of a bank in the compiled step", [float(copies)], 0, True, "", "compiled HLO"),
    ]  # fmt: skip


def several_streams(patches=9, width=512, layers=4, count=4, calls=5, runs=RUNS) -> list[Row]:
    """The next frame of several streams in one call, which reads the weights once."""
    vlm, params = watching(patches, width, layers)
    look = jax.jit(vlm.look, donate_argnums=1)
    together, alone = (Streams(look, params, vlm.watch(params, n), frames_of(vlm, n)) for n in (count, 1))
    calls = [functools.partial(together.take, calls), functools.partial(alone.take, calls * count)]
    for call in calls:
        call()
    seconds = in_turns(*calls, runs=runs)
    what = f"the next frame of {count} streams: in one call / in {count} calls"
    how = f"{patches} patches, {layers} layers of width {width}"
    return [Row(what, list(seconds[:, 0] / seconds[:, 1]), 0.6, True, "x", how)]


# --- data -------------------------------------------------------------------------------------------------------------


def write_jpegs(folder: Path, sizes: list[tuple[int, int]]) -> DataConfig:
    """A sample of one image for each (width, height), and a tokenizer in `folder`/tokenizer."""
    rng = np.random.default_rng(0)
    lines = []
    for number, (width, height) in enumerate(sizes):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        turns = [{"from": "human", "value": "<image>\nrow 1"}, {"from": "gpt", "value": "1 2 3"}]
        lines.append(json.dumps({"image": f"{number}.jpg", "conversations": turns}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    write_tokenizer(folder / "tokenizer")
    return DataConfig(train=(SourceConfig(str(folder / "data.jsonl")),))


def pipeline(count=16, steps=16, runs=RUNS) -> list[Row]:
    """Tiles of 640x480 JPEGs: the packed, threaded pipeline against one image after the other."""
    image, vision = ImageConfig(), families.resolve({"preset": "comemo_2b"}).vision
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_jpegs(folder, [(640, 480)] * count)
        config = DataConfig(train=written.train, pack_tokens=3584, pack_tiles=13)
        processor = TileProcessor(Tokenizer.load(folder / "tokenizer"), image, vision.geometry)
        plan = Plan.train(config, processor, seed=0)
        data = TrainData(plan, steps)

        def ours() -> None:
            for _ in data.iterate():
                pass

        def serial() -> list[np.ndarray]:
            return [normalised_tiles(folder / f"{n % count}.jpg", image, vision) for n in range(steps)]

        ours(), serial()
        seconds = in_turns(ours, serial, runs=runs)
    how = f"12 tiles of 448 px and a thumbnail each, {steps} images; serial: Pillow, then fp32 normalised on the host"
    what = "data: a serial loop that decodes, tiles and normalises / the pipeline, 640x480 JPEGs"
    return [Row(what, (seconds[:, 1] / seconds[:, 0]).tolist(), 2.2, False, "x", how)]


def normalised_tiles(path: Path, config: ImageConfig, vision: VisionConfig) -> np.ndarray:
    """The usual way: decode, resize, crop each tile, and normalise it to channels-first fp32."""
    picture, size = open_image(path), vision.image_size
    cols, rows = tile_grid(*picture.size, size, config)
    resized = picture.resize((cols * size, rows * size), Image.Resampling.BICUBIC)
    corners = itertools.product(range(rows), range(cols))
    tiles = [resized.crop((c * size, r * size, (c + 1) * size, (r + 1) * size)) for r, c in corners]
    tiles.append(picture.resize((size, size), Image.Resampling.BICUBIC))
    mean, std = np.array(vision.pixel_mean, np.float32), np.array(vision.pixel_std, np.float32)
    scaled = (np.asarray(tile, np.float32) / np.float32(255) for tile in tiles)
    return np.stack([((tile - mean) / std).transpose(2, 0, 1) for tile in scaled])


# --- compilations -----------------------------------------------------------------------------------------------------


class Watched(NextToken):
    """Notes how much had been compiled before each step."""

    seen: list[str]
    marks: list[int]

    def work(self, step: int, params: dict):
        """The step's data."""
        self.marks.append(len(self.seen))
        return super().work(step, params)


def recompilations(count=64, longest=400, training=200, generations=50, lengths=7) -> list[Row]:
    """Programs compiled after warm-up, with images of many sizes."""
    sizes = np.random.default_rng(1).integers(16, longest, (count, 2)).tolist()
    with tempfile.TemporaryDirectory() as name, compilations() as seen:
        folder, warm, steps = Path(name), 5, 5 + training
        data = write_jpegs(folder, sizes)
        image = {"max_tiles": 12}
        settings = {
            "model": {"preset": "tiny"},
            "image": image,
            "tokenizer": str(folder / "tokenizer"),
            "data": {"train": [{"path": data.train[0].path}], "pack_tokens": 256, "pack_tiles": 26, "rows": 2},
            "stages": [{"name": "finetune", "steps": steps, "learning_rate": 1e-3}],
            "checkpoint": {"every": 10 * steps, "keep_best": 0},
            "mesh": {"data": 1, "fsdp": 1},
        }
        Watched.seen, Watched.marks = seen, []
        train(experiment(settings), folder / "run", tasks={"next_token": Watched}, say=lambda line: None)
        while_training = Watched.marks[-1] - Watched.marks[warm]

        vlm, params = make({"preset": "tiny"})
        tokenizer = Tokenizer.load(folder / "tokenizer")
        processor = make_processor(tokenizer, ImageConfig(**image), vlm.config.vision.geometry)
        generator = Generator(vlm, params, stop_ids=[processor.stop_id], mesh=make_mesh(MeshConfig()))
        pictures = [open_image(folder / f"{n}.jpg") for n in range(len(sizes))]

        def answer(n: int) -> None:
            question = "row 1 " * (n % lengths + 1)
            prompt = processor.prompt(question, [pictures[n % len(pictures)]])
            generator.generate([prompt], SamplingConfig(max_new_tokens=8, temperature=float(n % 2), seed=n))

        warm = max(len(pictures), 2 * lengths)  # each length, drawn and not
        for n in range(warm):
            answer(n)
        warmed = len(seen)
        for n in range(generations):
            answer(warm + 3 * n)
        while_generating = len(seen) - warmed
    spread = f"{np.min(sizes)} to {np.max(sizes)} px a side"
    trained = f"compilations in {training} training steps on images of many sizes, after {warm}"
    generated, how = f"compilations in {generations} generations, after warm-up", f"questions of 1 to {lengths} words"
    return [
        Row(trained, [float(while_training)], 0, True, "", spread),
        Row(generated, [float(while_generating)], 0, True, "", f"{spread}, {how}; warm-up: one with each image"),
    ]


def image_sizes(shortest=64, longest=256, count=50) -> list[Row]:
    """Images of as many sizes through a tower that sees them in their own size: compilations and padding."""
    sizes = np.random.default_rng(2).integers(shortest, longest + 1, (count, 2)).tolist()
    vlm, params = make({"preset": "tiny_qwen2_5_vl"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_jpegs(folder, sizes)
        config = DataConfig(train=data.train, pack_tokens=2304, pack_tiles=2048)
        image, geometry = PatchConfig(shortest**2, longest**2), vlm.config.vision.geometry
        processor = make_processor(Tokenizer.load(folder / "tokenizer"), image, geometry, template="qwen2-vl")
        plan = Plan.train(config, processor, seed=0)
        plan.extend(20)
        prompts = [processor.prompt("row 1", [open_image(folder / f"{n}.jpg")]) for n in range(count)]
    batches = [pad_prompts([prompt], 1, vlm.tile) for prompt in prompts]
    slots = [batch.views.pixels_BISSc.shape[1] for batch in batches]
    used = sum(len(prompt.pixels_ISSc) for prompt in prompts)
    see = jax.jit(vlm.see)
    shapes = {tile_bucket(n, vlm.tile) for n in range(1, max(slots) + 1)}
    with compilations() as seen:
        for tiles in shapes:
            jax.block_until_ready(see(params, Batch.empty((1,), 1, tiles, vlm.tile).views))
        warmed = len(seen)
        for batch in batches:
            jax.block_until_ready(see(params, batch.views))
    spread = f"{len({tuple(size) for size in sizes})} sizes of {shortest} to {longest} px a side, 8 px a visual token"
    compiled = f"compilations of Qwen's tower on images of {count} sizes, after warm-up"
    packed = f"{len(plan)} rows of {config.pack_tiles} visual tokens"
    return [
        Row(compiled, [float(len(seen) - warmed)], 0, True, "", f"{spread}; after {warmed} shapes"),
        Row("padding of that tower, each image alone", [100 * (1 - used / sum(slots))], 15, True, "%", spread),
        Row("the same, images in packed rows", [100 * (1 - plan.fill["tiles"])], 15, True, "%", packed),
    ]


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

    def sample(prompts: list[Sample], keys: jax.Array) -> list[Trajectory]:
        return [t for _, drawn in rollouts(generator, prompts, sampling, keys, count * group) for t in drawn]

    learn = jax.jit(jax.grad(lambda params, rows: loss.loss(params, rows, None)[0]))

    def step(trajectories: list[Trajectory]) -> list[dict]:
        rows = pack_trajectories(trajectories, [1.0] * len(trajectories), data, vlm, at_once=4)
        return [learn(params, jax.tree.map(lambda x, n=n: x[n], rows)) for n in range(len(rows.beta_B))]

    keys_E1 = keys_PG.reshape(-1, 1)
    once, apart = functools.partial(sample, prompts, keys_PG), functools.partial(sample, each, keys_E1)
    trajectories = once()
    apart(), jax.block_until_ready(step(trajectories))
    seconds = in_turns(once, apart, lambda: step(trajectories), runs=runs)
    what = f"rollouts of GRPO, groups of {group} answers of {new} tokens: prompts of {tokens} tokens"
    together = "the same, of a whole step: rollouts and the update, which reads the prompt of each answer"
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
    generator, state, logits_BV, finished_B, choice = start(vlm, params, batch, 1024)
    form, insert = compiled_speech(vlm, generator.mesh)
    longest = speech.latents + 1
    latents_BND = jnp.zeros((rows, speech.latents, width), vlm.dtype)
    kinds_B = np.ones(rows, np.int32)
    calls = Calls.none(rows, 8)

    def spoken() -> jax.Array:
        nonlocal state, logits_BV, latents_BND, calls
        with generator.context():
            latents_BND, _ = form(params, state, latents_BND, np.arange(rows, dtype=np.int32), kinds_B, states)
            state, logits_BV, calls = insert(params, state, logits_BV, calls, latents_BND, kinds_B)
        return logits_BV

    def plain() -> jax.Array:
        nonlocal state, logits_BV, finished_B
        with generator.context():
            for _ in range(longest):
                state, logits_BV, finished_B, *_ = generator.programs.step(
                    params, state, logits_BV, finished_B, choice, np.int32(GREEDY)
                )
        return logits_BV

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


ITEMS = {
    "decode_step": decode_step,
    "cached_generation": cached_generation,
    "scanned_layers": scanned_layers,
    "memory_overhead": memory_overhead,
    "kept_frames": kept_frames,
    "streaming": streaming,
    "several_streams": several_streams,
    "pipeline": pipeline,
    "recompilations": recompilations,
    "image_sizes": image_sizes,
    "shared_prefill": shared_prefill,
    "forming": forming,
    "engine": engine,
    "engine_host": engine_host,
    "cache_use": cache_use,
}


TOY = {
    "decode_step": dict(layers=4, slots=128, calls=2, runs=2),
    "cached_generation": dict(prompts=(64,), layers=4, width=128, new=16, runs=2),
    "scanned_layers": dict(layers=4, tokens=64, builds=1, runs=2),
    "memory_overhead": dict(layers=4, width=128, tokens=64, runs=2),
    "kept_frames": dict(layers=1, width=128, tower=32, tokens=64, frames=4, runs=2),
    "streaming": dict(patches=4, width=32, near=2, far=40, calls=2, runs=2),
    "several_streams": dict(patches=4, width=32, layers=1, count=2, calls=2, runs=2),
    "pipeline": dict(count=2, steps=2, runs=2),
    "recompilations": dict(count=2, longest=64, training=2, generations=2, lengths=2),
    "image_sizes": dict(shortest=32, longest=64, count=2),
    "shared_prefill": dict(group=2, tokens=64, new=2, layers=2, width=128, runs=2),
    "forming": dict(rows=2, states=16, tokens=32, layers=2, width=128, runs=2),
    "engine": dict(requests=4, answers=6, slots=2, median=4, mixed=6, width=128, runs=2),
    "engine_host": dict(layers=4, slots=2, calls=2, runs=2),
    "cache_use": dict(long=256, short=64, filled=60, rows=2, layers=2, width=128, calls=2, runs=2),
}
"""Sizes at which each item runs in seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table, and says on stderr what is going on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="NAME", help=", ".join(ITEMS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--toy", action="store_true", help="small sizes, to see that everything runs")
    args = parser.parse_args(arguments)
    rows = []
    for name in args.only:
        measured = ITEMS[name](**TOY[name] if args.toy else {})
        for row in measured:
            line = f"{name}: {row.what} {row.median:.3g} {row.unit} ({row.note})"
            print(line, file=sys.stderr, flush=True)
        rows += measured
    report(rows, args.json)


if __name__ == "__main__":
    main()
