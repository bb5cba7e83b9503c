"""What building memories will take, told before a model is loaded: videos are decoded and cut, calls are counted.

Episodes are not known before the model decides; here they are of SEGMENTS segments. Answers in words are counted with
all the tokens they may have.
"""

import argparse
import collections
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from PIL import Image

from kernels_pallas.device import PEAKS
from vlmem_jax.agent.calls import Call, Reply, run
from vlmem_jax.agent.config import AgentConfig
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.subtitles import Track
from vlmem_jax.agent.watching import keeper, watch
from vlmem_jax.cli.memory_jobs import Video
from vlmem_jax.cli.memory_show import aligned, clock
from vlmem_jax.generate.load import describe
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import decode_flops, prefill_flops
from vlmem_jax.processing import Processor
from vlmem_jax.stream import Notes, Reading, Source, open_source

SEGMENTS = 3
"""Of an episode."""
SHARE = 0.4
"""Of a chip's peak that reading and seeing reach."""
ANSWER = "a caption of some length, as models write them. " * 12
NODE_BYTES, CALL_BYTES = 4096, 2048
"""Of the SQLite file: a node with its vectors, and a call with its answer."""


class Work(NamedTuple):
    """What a video takes."""

    seconds: float
    """Of the video."""
    segments: int
    calls: dict[str, int]
    images: int
    frames: int
    """Distinct ones that are kept."""
    bytes: int
    read: int
    written: int
    """Tokens, at most."""
    seeing: float
    """FLOPs of the tower, each frame once."""
    reading: float
    writing: float

    @property
    def disk(self) -> int:
        """Bytes of frames, nodes and calls, about."""
        return self.bytes + NODE_BYTES * 4 * self.segments + CALL_BYTES * sum(self.calls.values())


class _Counting:
    """Answers as a model may, and counts what it is asked."""

    def __init__(self, vlm: VLM, processor: Processor):
        self._config, self._processor = vlm.config, processor
        self._begun = len(processor.prompt("", name="an empty prompt").tokens_T)
        self.calls: collections.Counter[str] = collections.Counter()
        self.images = self.read = self.written = 0
        self.reading = self.writing = 0.0
        self.frame = 0, 0
        """Tokens and tiles of a frame."""

    def measure(self, picture: Image.Image) -> None:
        """Takes a frame of the video for any."""
        one, two = (self._processor.prompt([picture] * n, name="a frame") for n in (1, 2))
        self.frame = len(two.tokens_T) - len(one.tokens_T), len(two.pixels_ISSc) - len(one.pixels_ISSc)

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        return [self._answer(call) for call in calls]

    def _answer(self, call: Call) -> Reply:
        shown, words = len(call.frames), len(self._processor.tokenizer.encode(call.text))
        tokens = self._begun + words + shown * self.frame[0]
        self.calls[call.kind] += 1
        self.images += shown
        self.read += tokens
        self.reading += prefill_flops(self._config, 1, tokens, 0)
        if call.labels:
            label = "ADD_NEW" if self.calls["decide"] % SEGMENTS == 0 else "MERGE"
            return Reply(tokens=[(one, 0.0 if one == label else -10.0) for one in call.labels])
        self.written += call.max_tokens
        self.writing += call.max_tokens * decode_flops(self._config, 1, tokens + call.max_tokens // 2, 0)
        return Reply(ANSWER)


class _Measured:
    """A source whose first frame is measured."""

    def __init__(self, source: Source, counting: _Counting, side: int):
        self.name, self.live, self._source, self._counting, self._side = (
            source.name, source.live, source, counting, side)  # fmt: skip

    def __iter__(self):
        measured = False
        for shown in self._source:
            if not measured:
                picture = shown.picture()
                if self._side:
                    picture.thumbnail((self._side, self._side))
                self._counting.measure(picture)
                measured = True
            yield shown


def planned(source: Source, config: AgentConfig, track: Track, vlm: VLM, processor: Processor, notes: Notes) -> Work:
    """What a video takes. Raises ValueError if nothing can be decoded."""
    sizes: dict[str, int] = {}

    def write(jpeg: bytes) -> str:
        name = hashlib.blake2b(jpeg, digest_size=16).hexdigest()
        sizes[name] = len(jpeg)
        return name

    counting = _Counting(vlm, processor.limited(config.show.tokens))
    stream = StreamBuilder(keeper(write, config.ingest), config.ingest, config.build, track)
    end = run(watch(_Measured(source, counting, config.ingest.side), stream, notes), counting)
    run(stream.snapshot(), counting)
    tokens, tiles = counting.frame
    seeing = len(sizes) * (prefill_flops(vlm.config, 1, 1, tiles) - prefill_flops(vlm.config, 1, 1, 0))
    return Work(
        end, len(stream.builder.pyramid.segments), dict(counting.calls), counting.images, len(sizes),
        sum(sizes.values()), counting.read, counting.written, seeing, counting.reading, counting.writing,
    )  # fmt: skip


def run_plan(args: argparse.Namespace, videos: Sequence[Video], config: AgentConfig, image: Mapping[str, Any]) -> int:
    """Prints what all videos take."""
    vlm, processor = describe(args.checkpoint, args.adapter, image)
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.abstract())) * vlm.dtype.itemsize
    works = []
    for video in videos:
        notes, began = Notes(lambda text: print(text, flush=True)), time.monotonic()
        limits = {"max_pixels": processor.open_limit, "config": processor.image, "notes": notes}
        work = planned(open_source(video.name, Reading(args.fps, **limits)), config, video.track, vlm, processor, notes)
        works.append(work)
        print(f"{video.id}: decoded at {work.seconds / max(time.monotonic() - began, 1e-9):.1f} x real time")
        print("\n".join(aligned(_lines(work))), flush=True)
    whole = _sum(works)
    if len(works) > 1:
        print("all:")
        print("\n".join(aligned(_lines(whole))))
    print(f"predicted hours on a chip, at {SHARE:.0%} of its peak, {args.together} rows at a time:")
    rows = [[f"  {chip}", f"{_seconds(whole, weights, chip, args.together) / 3600:.3g}"] for chip in PEAKS]
    print("\n".join(aligned(rows)))
    return 0


def _seconds(work: Work, weights: int, chip: str, rows: int) -> float:
    """Reading and seeing are products; each token that is written reads all weights, for all rows once."""
    peak = PEAKS[chip]
    products = (work.seeing + work.reading) / (SHARE * peak.flops)
    return products + max(work.writing / (SHARE * peak.flops), work.written / rows * weights / peak.hbm)


def _sum(works: Sequence[Work]) -> Work:
    calls: collections.Counter[str] = collections.Counter()
    for work in works:
        calls.update(work.calls)
    rest = zip(*([value for key, value in work._asdict().items() if key != "calls"] for work in works), strict=True)
    seconds, segments, *others = map(sum, rest)
    return Work(seconds, segments, dict(calls), *others)


def _lines(work: Work) -> list[list[str]]:
    calls = ", ".join(f"{kind} {count:,}" for kind, count in work.calls.items())
    return [
        ["  length", clock(work.seconds)],
        ["  segments", f"{work.segments:,}, in episodes of {SEGMENTS} (an assumption)"],
        ["  calls", f"{sum(work.calls.values()):,}: {calls}"],
        ["  images", f"{work.images:,} shown, {work.frames:,} seen once"],
        ["  tokens", f"{work.read:,} read, {work.written:,} written at most"],
        ["  TFLOP", f"{(work.seeing + work.reading + work.writing) / 1e12:,.3g}: seeing {work.seeing / 1e12:.3g}, "
                    f"reading {work.reading / 1e12:.3g}, writing {work.writing / 1e12:.3g}"],
        ["  disk", f"{work.disk / 1e6:,.1f} MB, of it frames {work.bytes / 1e6:,.1f}"],
    ]  # fmt: skip
