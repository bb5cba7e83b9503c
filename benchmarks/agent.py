"""What a memory of a video costs to build, beside what it cannot do without.

    python -m benchmarks.agent                    # some minutes
    python -m benchmarks.agent --only hours --json rows.json
    python -m benchmarks.agent --toy              # does everything run? The figures mean nothing

A small model of random weights answers through the engine; where episodes begin is given. Ratios are of runs that take
turns; still, nothing else should be running.
"""

import functools
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/agent.py`

from benchmarks.measure import Row, command, in_turns
from benchmarks.models import make
from vlmem_jax.agent import prompts
from vlmem_jax.agent.building import BuildConfig, Pyramid, build
from vlmem_jax.agent.calls import Call, Reply, Work, run, run_all
from vlmem_jax.agent.embed import LexicalEmbedder, LexicalReranker
from vlmem_jax.agent.manager import ACTIONS, ManageConfig
from vlmem_jax.agent.model import EngineModel, ShowConfig
from vlmem_jax.agent.nodes import Extracted, Frame, Segment
from vlmem_jax.agent.retrieve import Memory, RetrieveConfig, answer
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import IngestConfig, Span
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.watching import keeper
from vlmem_jax.agent.writing import Writer, journalled, write_store
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Engine, Generator
from vlmem_jax.models import flops
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.processing import StepConfig, Tokenizer, make_processor
from vlmem_jax.runtime.shapes import PoolShape

SIDE = 16
"""Of pictures, of 4 visual tokens each."""
SECONDS = 10.0
"""Of a segment."""
EPISODE = 6
"""Segments of an episode."""
BUILD = BuildConfig(ManageConfig(images=16, reserved=4), fps=0.2, schema_fps=0.1, images=16)
MEMORY = Path("/dev/shm")
"""Where files need not wait for a disk."""
LABELS = "ADD_NEW", "MERGE", "DISCARD", "yes", "no", "A", "B"


class Asked(NamedTuple):
    """A call that was answered."""

    call: Call
    reply: Reply


class World:
    """A model behind an engine, and videos that it has not seen."""

    def __init__(self, layers: int, width: int, slots: int, new: int):
        """`new`: tokens of a text."""
        decoder = dict(layers=layers, width=width, heads=width // 32, kv_heads=width // 64, head_dim=32,
                       rope_sections=(6, 5, 5), mlp_width=3 * width)  # fmt: skip
        self.vlm, self.params = make({"preset": "tiny_qwen3_vl", "decoder": decoder})
        with tempfile.TemporaryDirectory() as name:
            write_tokenizer(Path(name), kept=LABELS)
            tokenizer = Tokenizer.load(name)
        image = StepConfig(min_pixels=SIDE**2, max_pixels=4096)
        self.processor = make_processor(tokenizer, image, self.vlm.config.vision.geometry, "", "qwen-vl-steps")
        longest = 256 + new
        self.new = new
        self.shape = PoolShape(slots, longest, longest, 4 * BUILD.images, smallest=longest, features=4096)
        self.generator = Generator(self.vlm, self.params, stop_ids=[], banned_ids=self.processor.control_ids)

    def model(self) -> "Fresh":
        """The model, which has seen nothing yet; it compiles nothing that was compiled before."""
        return Fresh(
            EngineModel(Engine(self.generator, self.shape), self.processor, picture, ShowConfig(4, 4)), self.new
        )


class Fresh:
    """A model whose texts are as long as they may be, and whose decisions are made."""

    def __init__(self, model: EngineModel, new: int):
        self.model, self.new, self.asked = model, new, []

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        """As the model does, but for what is decided."""
        replies = self.model.answer([call._replace(max_tokens=min(call.max_tokens, self.new)) for call in calls])
        replies = [self._decided(call, reply) for call, reply in zip(calls, replies, strict=True)]
        self.asked += map(Asked, calls, replies)
        return replies

    def _decided(self, call: Call, reply: Reply) -> Reply:
        if call.kind != "decide":
            return reply
        begins = int(call.frames[-1].time // SECONDS) % EPISODE == 0
        return reply._replace(tokens=[(ACTIONS[0] if begins else ACTIONS[1], 0.0)])


def picture(frame: Frame) -> Image.Image:
    """What a frame shows."""
    rng = np.random.default_rng(zlib.crc32(frame.name.encode()))
    return Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8))


def video(name: str, segments: int, frames: int = 10) -> list[Segment]:
    """A video in segments of so many frames."""
    found = []
    for n in range(segments):
        span = Span(n * SECONDS, (n + 1) * SECONDS)
        times = np.linspace(*span, frames, endpoint=False).tolist()
        found.append(Segment(n, *span, frames=tuple(Frame(f"{name} {at:g}", at) for at in times)))
    return found


def captions(segments: Sequence[Segment]) -> Work[None]:
    """What is said of each segment, and nothing else."""
    yield [prompts.caption(one.frames) for one in segments]


def work_of(config: ModelConfig, asked: Sequence[Asked]) -> float:
    """FLOPs of the answers."""
    total, decoder = 0, config.decoder
    of_tile = sum(config.vision.flops) + config.vision.projector_flops(decoder.width)
    for _, reply in asked:
        cost = reply.cost
        total += sum(decoder.flops(cost.prompt_tokens)) + 2 * decoder.width * decoder.vocab + cost.seen * of_tile
        total += cost.new_tokens * flops.decode_flops(config, 1, cost.prompt_tokens, 0)
    return float(total)


# --- what is measured -------------------------------------------------------------------------------------------------


def building(videos=8, segments=12, layers=2, width=64, slots=8, new=128, runs=3) -> list[Row]:
    """A whole memory against the captions of its segments alone, and many videos at once against each by itself."""
    world = World(layers, width, slots, new)
    films = [video(f"film {n}", segments) for n in range(videos)]
    told: dict[str, Fresh] = {}

    def ask(how: str) -> None:
        told[how] = model = world.model()
        if how == "apart":
            for film in films:
                run(build(film, BUILD), model)
        else:
            run_all([captions(film) if how == "captions" else build(film, BUILD) for film in films], model)

    asks = [functools.partial(ask, how) for how in ("captions", "whole", "apart")]
    for once in asks:
        once()
    seconds = in_turns(*asks, runs=runs)
    work = {how: work_of(world.vlm.config, model.asked) for how, model in told.items()}
    counts = {how: len(model.asked) for how, model in told.items()}
    features, shown = told["whole"].model._engine.features, {}
    for call, _ in told["whole"].asked:
        shown |= {frame.name: 4 for frame in call.frames}
    times = sum(len(call.frames) for call, _ in told["whole"].asked) / len(shown)
    how = f"{videos} videos of {segments} segments, episodes of {EPISODE}"
    return [
        Row("a whole build / its captions alone", list(seconds[:, 1] / seconds[:, 0]), 1.35, True, "x",
            f"{how}; FLOPs {work['whole'] / work['captions']:.2f} x, calls {counts['whole']} / {counts['captions']}"),
        Row(f"{videos} videos one after the other / side by side", list(seconds[:, 2] / seconds[:, 1]), 2.5, False, "x",
            f"{how}, {slots} rows"),
        Row("FLOPs of a whole build / of its captions", [work["whole"] / work["captions"]], None, True, "x", how),
        Row("how often the tower sees a frame", [features.seen / sum(shown.values())], 1, True, "",
            f"{len(shown)} frames, each shown {times:.1f} times"),
    ]  # fmt: skip


def journal(segments=12, layers=2, width=64, slots=8, new=128, runs=3) -> list[Row]:
    """What it takes to keep each answer, as a part of a build; and a build that is there already."""
    world, shares, again = World(layers, width, slots, new), [], 0
    film = video("film", segments)
    run(build(film, BUILD), world.model())
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name, write_store(name, {"video": "film"}) as store:
            timed, start = Timed(store), time.perf_counter()
            run(journalled(build(film, BUILD), timed), world.model())
            shares.append(100 * timed.seconds / (time.perf_counter() - start))
            model = world.model()
            run(journalled(build(film, BUILD), store), model)
            again += len(model.asked)
    how = f"{segments} segments; transactions wait for the disk"
    return [
        Row("of the time of a build, its journal", shares, 2, True, "%", how),
        Row("calls of the model in a build that was finished", [float(again)], 0, True, "", how),
    ]


class Timed:
    """A store, and how long it takes to be asked and written."""

    def __init__(self, store: Writer):
        self._store, self.seconds = store, 0.0

    def reply(self, key: str) -> Reply | None:
        """As the store's."""
        start = time.perf_counter()
        found = self._store.reply(key)
        self.seconds += time.perf_counter() - start
        return found

    def transaction(self) -> "Timed":
        """As the store's."""
        self._start, self._open = time.perf_counter(), self._store.transaction()
        return self

    def __enter__(self):
        return self._open.__enter__()

    def __exit__(self, *how):
        done = self._open.__exit__(*how)
        self.seconds += time.perf_counter() - self._start
        return done


def compiled(lengths=(3, 20, 7), layers=2, width=64, slots=4, new=8) -> list[Row]:
    """Videos of other lengths, with frames of other sizes, and questions about them, after warm-up."""
    world = World(layers, width, slots, new)
    model, embed, rerank = world.model(), LexicalEmbedder(), LexicalReranker()
    model.model._engine.warm_up()
    model.model._image_of = lambda frame: picture(frame).resize((SIDE + 8 * (len(frame.name) % 4), SIDE))
    with compilations() as found:
        for n, length in enumerate(lengths):
            film = video(f"film {'x' * n}", length, frames=3 + 4 * n)
            memory = Memory.of(run(build(film, BUILD), model), lambda span, fps: (), Span(0, length), embed,
                               SchemaConfig())  # fmt: skip
            run(answer(memory, "which room?", ["red", "blue"], embed, rerank, RetrieveConfig(images=16)), model)
    what = f"compilations in {len(lengths)} videos and questions, after warm-up"
    return [Row(what, [float(len(found))], 0, True, "", f"{lengths} segments, {len(model.asked)} calls")]


# --- hours ------------------------------------------------------------------------------------------------------------


def hours(minutes=180, rate=5.0, fps=5.0) -> list[Row]:
    """A long video, frame by frame, into a store: what calls hold at most, and what is held in memory and on disk."""
    ingest, config, heard = IngestConfig(fps=fps), BuildConfig(), Told()
    resident: list[float] = []
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name:
        with write_store(name, {"video": "film"}) as store:
            stream = StreamBuilder(keeper(store.frames.write, ingest), ingest, config)
            start = time.perf_counter()
            run(journalled(remember(stream, store, shown(60 * minutes, rate), resident), store), heard)
            seconds, counts = time.perf_counter() - start, store.counts()
        sizes = {path: path.stat().st_size for path in Path(name).rglob("*") if path.is_file()}
    disk, frames = (sum(sizes[path] for path in sizes if path.suffix.startswith(kind)) for kind in ("", ".jpg"))
    limits = dict.fromkeys(heard.most, config.images) | {"decide": config.manage.images}
    third = len(resident) // 3
    how = f"{minutes} minutes at {rate:g} frames a second, {counts['segment']} segments, {counts['episode']} episodes"
    return [
        Row("largest call of a long video, frames / its budget",
            [max(heard.most[kind] / limits[kind] for kind in limits)], 1, True, "", how),
        Row("memory held by the process: at the end / after a third", [resident[-1] / resident[third]], 1.1, True, "x",
            f"{resident[-1] / 2**20:.0f} MiB at the end"),
        Row("disk of a minute", [disk / minutes / 2**20], None, True, "MiB", f"{frames / disk:.0%} of it frames"),
        Row("build of a long video but for its model, times real time", [60 * minutes / seconds], None, False, "x",
            how),
    ]  # fmt: skip


class Told:
    """A model that says something of everything, in no time; `most` are the frames of its largest calls, by kind."""

    def __init__(self):
        self.most: dict[str, int] = {}

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        """Episodes are of all lengths, some of them as long as an hour."""
        for call in calls:
            self.most[call.kind] = max(self.most.get(call.kind, 0), len(call.frames))
        return [self._reply(call) for call in calls]

    def _reply(self, call: Call) -> Reply:
        if call.kind == "decide":
            time = call.frames[-1].time
            begins = time % 3600 > 1800 and zlib.crc32(call.key.encode()) % 6 == 0
            return Reply(tokens=[(ACTIONS[0] if begins else ACTIONS[1], 0.0)])
        if call.kind == "extract":
            return Reply('{"scenes": [{"location": "kitchen"}], "entities": [{"entity name": "cup"}]}')
        return Reply(f'{{"description": "somebody washes cup {call.key} at the sink{" and dries it" * 30}"}}')


def shown(seconds: float, rate: float) -> Iterator[tuple[float, np.ndarray]]:
    """Frames of 160 x 90 with their times: something moves before a wall that changes every 40 seconds or so."""
    rng, wall = np.random.default_rng(0), None
    for n in range(int(seconds * rate)):
        if n % int(37 * rate) == 0:
            wall = np.repeat(np.repeat(rng.integers(0, 256, (6, 10, 3), np.uint8), 15, 0), 16, 1)
        frame = wall.copy()
        frame[30:60, n % 140 : n % 140 + 20] = n * 7 % 256
        yield n / rate, frame


def remember(
    stream: StreamBuilder, store: Writer, frames: Iterator[tuple[float, np.ndarray]], resident: list[float]
) -> Work[None]:
    """Builds the memory of frames, and writes what is closed."""
    embed, saved, end = LexicalEmbedder(), [0, 0], 0.0

    def save(pyramid: Pyramid) -> None:
        segments, episodes = pyramid.segments[saved[0] :], pyramid.episodes[saved[1] :]
        if not (segments or episodes):
            return
        with store.transaction() as batch:
            for one in (*segments, *episodes):
                batch.put(one, np.asarray(embed([one.caption])))
            for one in episodes:
                batch.put(Extracted(one.number, one.start, one.end, pyramid.extracted[one.number]))
        saved[:] = len(pyramid.segments), len(pyramid.episodes)

    for end, frame in frames:
        closed = yield from stream.push(frame, end)
        if closed:
            save(stream.builder.pyramid)
            resident.append(held())
    yield from stream.flush(end)
    save((yield from stream.snapshot()))
    resident.append(held())


def held() -> float:
    """Bytes of memory that the process holds now."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


ITEMS = {"building": building, "journal": journal, "compiled": compiled, "hours": hours}
TOY = {
    "building": dict(videos=2, segments=3, layers=2, width=64, slots=2, new=4, runs=1),
    "journal": dict(segments=3, layers=2, width=64, slots=2, new=4, runs=1),
    "compiled": dict(lengths=(1, 4), slots=2, new=4),
    "hours": dict(minutes=4, rate=1.0, fps=1.0),
}
"""Sizes at which each item runs in seconds."""


def main(arguments: list[str] | None = None) -> None:
    """Measures, and prints the table."""
    command(__doc__, ITEMS, TOY, arguments)


if __name__ == "__main__":
    main()
