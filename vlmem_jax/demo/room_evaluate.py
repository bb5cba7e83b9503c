"""Answers to held-out questions about rooms, from the few frames that stand in the sequence, whichever those are."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from vlmem_jax.data.geometry import ClipKey, GeometryStore
from vlmem_jax.demo.room_dataset import SHOWN
from vlmem_jax.demo.rooms import SIDE
from vlmem_jax.generate import Generator, LoadedModel, Pool, Request, SamplingConfig, never_sampled
from vlmem_jax.models import VLM
from vlmem_jax.processing.frames import spread
from vlmem_jax.processing.video import VideoSize, probe, read_frames
from vlmem_jax.types import Batch, Geometry, Views, VisualTokens


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video, and what is asked about it."""

    pixels_TSSc: UInt8[np.ndarray, "T S S 3"]
    asked: dict[str, tuple[str, str]]
    """Question and answer by type."""
    best: dict[str, int]
    """The frame that shows most of each poster, by its colour."""
    path: Path
    name: str

    def geometry(self, store: GeometryStore, reads: Any) -> Geometry:
        frames = len(self.pixels_TSSc)
        return store.read(ClipKey(self.name, tuple(range(frames)), (frames, SIDE, SIDE)), self.path, reads)


class Videos(NamedTuple):
    """Videos of one length, C of them."""

    clips: list[Clip]
    store: GeometryStore

    @classmethod
    def read(cls, dataset: Path, name: str) -> "Videos":
        """Those of NAME.jsonl of a dataset."""
        lines = (dataset / f"{name}.jsonl").read_text().splitlines()
        clips = [_clip(dataset, json.loads(line)) for line in lines]
        return cls(clips, GeometryStore(str(dataset / f"{name}.array_record")))


def _clip(dataset: Path, line: dict[str, Any]) -> Clip:
    path = dataset / line["video"]
    frames = read_frames(path, list(range(probe(path).frames)))
    asked = {kind: tuple(pair) for kind, pair in line["asked"].items()}
    return Clip(np.stack([np.asarray(frame) for frame in frames]), asked, line["best"], path, line["video"])


LONGEST_ANSWER = 2
"""Tokens."""
SIDE_BY_SIDE = 64
"""Questions that are answered at once."""
Choose = Callable[[Clip, int], list[int]]
"""The frames of a video that are shown; the number tells videos apart."""


def uniform(clip: Clip, number: int) -> list[int]:
    return spread(len(clip.pixels_TSSc), SHOWN)


def last(clip: Clip, number: int) -> list[int]:
    return list(range(len(clip.pixels_TSSc) - SHOWN, len(clip.pixels_TSSc)))


def at_random(clip: Clip, number: int) -> list[int]:
    chosen = np.random.default_rng(number).choice(len(clip.pixels_TSSc), SHOWN, replace=False)
    return np.sort(chosen).tolist()


def oracle(clip: Clip, number: int) -> list[int]:
    """The first frame, the best one of each poster, and others."""
    wanted = {0, *clip.best.values()}
    others = [time for time in uniform(clip, number) + last(clip, number) if time not in wanted]
    return sorted([*wanted, *others[: SHOWN - len(wanted)]])


CHOICES: dict[str, Choose] = {"uniform": uniform, "last": last, "random": at_random, "oracle": oracle}

Shown = tuple[Float[Array, "C M D"], Int[np.ndarray, "C L"]]
"""Visual tokens of the L frames that are shown of each of C videos, and which those are."""


def chosen_frames(model: LoadedModel, videos: Videos, choose: Choose) -> Shown:
    """The visual tokens of the frames that are shown of each video, and which those are."""
    times_CL = np.array([choose(clip, n) for n, clip in enumerate(videos.clips)])
    views = _views(model, videos, times_CL)
    seen = _programs(model.vlm).see(model.params, views)
    return seen.tokens_BMD, times_CL


def streamed(model: LoadedModel, videos: Videos) -> Shown:
    """The same where a memory has seen all frames, one after the other, and shows those that it keeps."""
    programs = _programs(model.vlm)
    everywhere = NamedSharding(model.mesh, PartitionSpec())  # as what comes out of `look`: it compiles once
    state = jax.device_put(programs.watch(model.params, len(videos.clips)), everywhere)
    frames = len(videos.clips[0].pixels_TSSc)
    views = _views(model, videos, np.tile(np.arange(frames), (len(videos.clips), 1)))
    geometry = views.geometry
    for time in range(frames):
        frame = dataclasses.replace(
            views,
            pixels_BISSc=views.pixels_BISSc[:, time : time + 1],
            segments_BM=views.segments_BM[:, : model.vlm.tokens_per_tile],
            positions_BM=views.positions_BM[:, : model.vlm.tokens_per_tile],
            geometry=geometry and jax.tree.map(lambda x, time=time: x[:, time : time + 1], geometry),
        )
        state = programs.look(model.params, state, frame)
    times_CL = np.sort(np.asarray(state.episodes.time_BL), axis=-1)
    return programs.recollect(model.params, state).tokens_BMD, times_CL


def strided(model: LoadedModel, videos: Videos) -> Shown:
    """The same where a memory has seen all frames, and some that are spread evenly are shown as it left them."""
    C, frames = len(videos.clips), len(videos.clips[0].pixels_TSSc)
    shown_L = np.array(uniform(videos.clips[0], 0))
    seen = _programs(model.vlm).see(model.params, _views(model, videos, np.tile(np.arange(frames), (C, 1))))
    tokens_CTPD = seen.tokens_BMD.reshape(C, frames, model.vlm.tokens_per_tile, -1)
    return tokens_CTPD[:, shown_L].reshape(C, -1, tokens_CTPD.shape[-1]), np.tile(shown_L, (C, 1))


def show(model: LoadedModel, videos: Videos, frames: str) -> Shown:
    """By the name of the way in which frames are chosen: one of CHOICES, `kept` or `stride`."""
    if frames in CHOICES:
        return chosen_frames(model, videos, CHOICES[frames])
    return streamed(model, videos) if frames == "kept" else strided(model, videos)


def coverage(videos: Videos, times_CL: Int[np.ndarray, "C L"]) -> float:
    """The share of posters of which the frame that shows most is among those that are shown."""
    return float(
        np.mean(
            [
                np.isin(list(clip.best.values()), times_L).mean()
                for clip, times_L in zip(videos.clips, times_CL, strict=True)
            ]
        )
    )


def _views(model: LoadedModel, videos: Videos, times_CL: Int[np.ndarray, "C L"]) -> Views:
    """Frames of each video, each video a row."""
    C, L = times_CL.shape
    tile = model.vlm.tile
    views = Batch.empty((C,), 1, L, tile).views
    views.segments_BM[...] = 1
    for n, (clip, times_L) in enumerate(zip(videos.clips, times_CL, strict=True)):
        views.pixels_BISSc[n] = clip.pixels_TSSc[times_L]
        if tile.geometry:
            views.geometry.put(n, jax.tree.map(lambda x, t=times_L: x[t], clip.geometry(videos.store, tile.geometry)))
    return views


class _Programs(NamedTuple):
    see: Callable
    watch: Callable
    look: Callable
    recollect: Callable


@functools.lru_cache(maxsize=16)
def _programs(vlm: VLM) -> _Programs:
    watch, look = jax.jit(vlm.watch, static_argnums=1), jax.jit(vlm.look, donate_argnums=1)
    return _Programs(jax.jit(vlm.see), watch, look, jax.jit(vlm.recollect))


def answers(model: LoadedModel, videos: Videos, tokens_CMD: Float[Array, "C M D"]) -> list[dict[str, str]]:
    """What the model says to each type of question about each video: its most probable words.

    All frames that are given are shown, whichever of a video the model was trained with. What a memory does with them
    is done when they are seen, so models that differ in it answer by the same programs.
    """
    vlm = VLM(dataclasses.replace(model.vlm.config, memory=None))
    params = {part: leaves for part, leaves in model.params.items() if part != "memory"}
    processor, M = model.showing({"context": "all"}).processor, tokens_CMD.shape[1]
    banned = never_sampled(processor, vlm)
    generator = Generator(vlm, params, stop_ids=processor.stop_ids, banned_ids=banned, mesh=model.mesh)
    size = VideoSize(M // vlm.tokens_per_tile, SIDE, SIDE)
    slots_1M, where, asked = np.zeros((1, M), np.int32), [], []
    for n, clip in enumerate(videos.clips):
        visual = VisualTokens(tokens_CMD[n : n + 1], slots_1M, slots_1M + 1)
        for kind, (question, _) in clip.asked.items():
            where.append((n, kind))
            asked.append(Request(processor.recalled(question, size), SamplingConfig(LONGEST_ANSWER), visual=visual))
    said: list[dict[str, str]] = [{} for _ in videos.clips]
    for (n, kind), handle in zip(where, Pool(generator, SIDE_BY_SIDE).submit(asked), strict=True):
        said[n][kind] = processor.tokenizer.decode(handle.result()).strip()
    return said


def tally(videos: Videos, said: Sequence[dict[str, str]]) -> dict[str, list[int]]:
    """[right answers, questions] by type."""
    found: dict[str, list[int]] = {}
    for clip, answered in zip(videos.clips, said, strict=True):
        for kind, (_, right) in clip.asked.items():
            counts = found.setdefault(kind, [0, 0])
            counts[0] += answered[kind] == right
            counts[1] += 1
    return found
