"""Ratios on a CPU of streams: what the next frame of a video that goes on costs, and answers about it."""

import dataclasses
import functools
import gc
import itertools
import math
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from benchmarks.measure import RUNS, Row, in_turns, packed_batch
from benchmarks.models import make
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import LoadedModel, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.processing import FrameConfig, Tokenizer, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.stream import Asker, Notes, Question, Reading, Show, Shown, Stream, Watcher
from vlmem_jax.trees import State, to_host
from vlmem_jax.types import Views

ONE_LAYER = {"layers": 1}
"""A decoder that takes next to no time."""


def watching(patches: int, width: int, layers: int, decoder: Mapping[str, int] = ONE_LAYER) -> tuple[VLM, dict]:
    """A model that keeps frames of so many patches, with banks of as many as the paper's."""
    sizes = dict(layers=layers, width=width, heads=4, mlp_width=4 * width)
    vision = dict(**sizes, image_size=8 * math.isqrt(patches), patch_size=8)
    memory = dict(kind="vlm2", geometry_width=0, working=8, episodic=32, heads=4)
    return make({"preset": "tiny_llava_video", "decoder": dict(decoder), "vision": vision, "memory": memory})


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


@functools.partial(jax.jit, donate_argnums=2, static_argnums=(0, 4))
def after(vlm: VLM, params: dict, state: State, views: Views, count: int) -> State:
    """What is kept after so many frames, no two of them alike."""

    def step(n: jax.Array, state: State) -> State:
        noise = jax.random.normal(jax.random.key(n), views.pixels_BISSc.shape)
        return vlm.look(params, state, dataclasses.replace(views, pixels_BISSc=noise))

    return jax.lax.fori_loop(0, count, step, state)


def live() -> int:
    """Bytes of all arrays on the devices."""
    return sum(x.nbytes for x in jax.live_arrays())


def streaming(patches=16, width=64, near=100, far=100_000, calls=50, runs=RUNS) -> list[Row]:
    """The next frame of a stream that has gone on for long, against that of a young one."""
    vlm, params = watching(patches, width, layers=1)
    look, views = jax.jit(vlm.look, donate_argnums=1), frames_of(vlm, 1)

    banks = {leaf.shape for leaf in jax.tree.leaves(vlm.watch(params, 1)) if leaf.ndim == 4}
    shapes = [f"[{','.join(map(str, bank))}]" for bank in banks]
    program = look.lower(params, vlm.watch(params, 1), views).compile().as_text()
    copies = sum(" copy(" in line and any(shape in line for shape in shapes) for line in program.splitlines())
    held, streams = [live()], []
    for age in (near, far):
        streams.append(Streams(look, params, after(vlm, params, vlm.watch(params, 1), views, age), views))
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


# --- as `vlmem stream` does it ----------------------------------------------------------------------------------------


QUESTION = "Which digit is in row 1?"
RATE = 2.0
"""Frames a second."""


def asking(vlm: VLM, params: dict, new: int) -> Asker:
    """A stream of which nothing was seen yet, and whose answers have so many tokens, whatever they are."""
    with tempfile.TemporaryDirectory() as name:
        write_tokenizer(Path(name), [FRAME])
        tokenizer = Tokenizer.load(name)
    processor = make_processor(tokenizer, FrameConfig(), vlm.config.vision.geometry, "", "llava-video", False)
    watcher = Watcher(LoadedModel(vlm, params, processor, make_mesh(MeshConfig())))
    watcher.generator.stop_ids = ()
    return Asker(watcher, SamplingConfig(new))


class Frames:
    """A source that shows one picture again and again, as fast as it is asked, for as long as it is wanted."""

    name, live = "frames", False

    def __init__(self, side: int, wanted: Callable[[int], bool]):
        self._picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
        self._wanted = wanted

    def __iter__(self) -> Iterator[Shown]:
        for n in itertools.takewhile(self._wanted, itertools.count()):
            yield Shown(n / RATE, (n + 1) / RATE, lambda: self._picture)


def first_token(patches=16, width=64, near=100, far=100_000, new=16, runs=RUNS) -> list[Row]:
    """The first token of an answer about a stream that has gone on for long, against that of a young one."""
    asker = asking(*watching(patches, width, layers=1), new)
    vlm, model = asker.watcher.vlm, asker.watcher.model
    views, side = frames_of(vlm, 1), vlm.tile.side
    frame_SSc = np.zeros((side, side, 3), np.uint8)

    def aged(age: int) -> Asker:
        watcher = Watcher(model)
        state = after(vlm, model.params, vlm.watch(model.params, 1), views, age)
        times = {str(n): n / RATE for n in vlm.kept(model.params, state)[0].tolist()}
        arrays = {f"memory/{name}": x for name, x in to_host(state).items()}
        watcher.restore(watcher.save()[0] | arrays, [{"frames": age, "times": times}])
        return Asker(watcher, asker.sampling)

    def ask(asker: Asker) -> None:
        length = asker.watcher.frames_B[0] / RATE
        next(asker.answer(QUESTION, asker.watcher.snapshot(), length))

    def look(asker: Asker) -> None:
        """Makes a state of its own, so that nothing of the answer before is of use."""
        asker.watcher.look([frame_SSc], [asker.watcher.frames_B[0] / RATE])

    askers = [aged(age) for age in (near, far)]
    for each in askers:
        look(each), ask(each)
    with compilations() as seen:
        turns = [functools.partial(work, each) for each in askers for work in (look, ask)]
        seconds = in_turns(*turns, runs=runs)
    what, how = (
        "the first token of an answer",
        f"{1e3 * np.median(seconds[:, 1]):.3g} ms, with making its visual tokens",
    )
    return [
        Row(f"{what}: at frame {far} / at frame {near}", list(seconds[:, 3] / seconds[:, 1]), 1.05, True, "x", how),
        Row(f"{what}: compilations after warm-up", [float(len(seen))], 0, True, "", how),
    ]


def long_stream(patches=16, width=64, warm=2000, count=20_000) -> list[Row]:
    """What a process holds after many frames of `vlmem stream`, against what it held after the first of them."""
    watcher = (asker := asking(*watching(patches, width, layers=1), new=1)).watcher

    def run(frames: int) -> tuple[int, int]:
        reading = Reading(fps=RATE, notes=Notes(lambda text: None))
        silent = Show(lambda seconds, question: None, lambda piece: None, lambda problem: None)
        source = Frames(watcher.vlm.tile.side, lambda n: n < frames)
        Stream(asker, source, reading, silent).run(threading.Event())
        gc.collect()
        return resident(), live()

    asker.warm()
    (held, arrays), seen_first = run(warm), watcher.frames_B[0]
    with compilations() as seen:
        held_then, arrays_then = run(count)
    assert watcher.frames_B[0] == seen_first + count
    what, how = f"{count} frames of a stream", f"{held_then / 2**20:.4g} MiB; before: {warm} frames"
    return [
        Row(f"{what}: memory of the process, after / before", [held_then / held], 1.01, True, "x", how),
        Row(f"{what}: live bytes that differ", [float(abs(arrays_then - arrays))], 0, True, "", f"{arrays} bytes"),
        Row(f"{what}: compilations", [float(len(seen))], 0, True, "", how),
    ]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def beside_answers(patches=16, width=256, layers=4, deep=8, new=256, alone=100, runs=RUNS) -> list[Row]:
    """The frames of a stream while an answer is written, against those before and behind it. A token takes about as
    long as a frame, so they get in each other's way."""
    decoder = dict(layers=deep, width=width, head_dim=width // 4, mlp_width=4 * width)
    asker = asking(*watching(patches, width, layers, decoder), new)
    asker.warm()

    def written() -> float:
        """Seconds of an answer alone."""
        begin = time.perf_counter()
        for _ in asker.answer(QUESTION, asker.watcher.snapshot(), 1.0):
            pass
        return time.perf_counter() - begin

    def run() -> tuple[float, float, float]:
        """Seconds of a frame alone and beside an answer, and those of the answer."""
        marks: list[tuple[float, int]] = []

        def mark(*_) -> None:
            marks.append((time.perf_counter(), stream.looked))

        def wanted(n: int) -> bool:
            if n == alone // 4 or len(marks) == 3 and n > marks[2][1] + alone:
                mark()
            return len(marks) < 4

        source, asked = Frames(asker.watcher.vlm.tile.side, wanted), [Question(QUESTION, alone / RATE)]
        reading = Reading(fps=RATE, notes=Notes(lambda text: None))
        stream = Stream(asker, source, reading, Show(mark, lambda piece: None, mark), asked)
        stream.run(threading.Event())
        before, beside, behind = (np.subtract(then, now) for now, then in itertools.pairwise(marks))
        seconds, frames = before + behind
        return seconds / frames, beside[0] / beside[1], beside[0]

    run()
    found = np.array([(*run(), written()) for _ in range(runs)])
    frame_ms, token_ms = 1e3 * np.median(found[:, 0]), 1e3 * np.median(found[:, 3]) / new
    what, how = f"while an answer of {new} tokens is written", f"{frame_ms:.3g} ms a frame, {token_ms:.3g} ms a token"
    return [
        Row(f"the next frame of a stream {what} / alone", list(found[:, 1] / found[:, 0]), 1.5, True, "x", how),
        Row("such an answer / one alone", list(found[:, 2] / found[:, 3]), None, True, "x", how),
    ]
