"""The geometry of all that data show, computed once and kept: for `vlmem data geometry`."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from vlmem_jax.data.geometry import FORMAT, ClipKey, Values, mark_of, write_clips
from vlmem_jax.data.records import open_shard, shard_name, split
from vlmem_jax.data.samples import Key, Samples
from vlmem_jax.geometry.coordinates import Scale, clip_geometry
from vlmem_jax.geometry.model import GeometryModel, load_geometry
from vlmem_jax.geometry.pictures import Fit, pictures
from vlmem_jax.processing import FrameConfig, Processor, images, video
from vlmem_jax.processing.processor import naming
from vlmem_jax.types import Geometry, GeometryShape

CLIPS_A_FILE = 8
"""A gigabyte at 32 frames, and what is done again after a kill."""


@dataclasses.dataclass(frozen=True)
class Seer:
    """What a model of geometry makes of clips, for a memory that reads so much of each frame: a `GeometryOf`."""

    model: GeometryModel
    reads: GeometryShape
    fit: Fit = "crop"
    scale: Scale = "clip"
    by_confidence: bool = False
    """Whether the coordinates of a patch are the mean of its pixels' by their confidence."""

    def __post_init__(self):
        if (gives := (self.model.token_width, self.model.view_width)) != self.reads[1:]:
            raise ValueError(
                f"the memory reads tokens of {self.reads.tokens} and views of {self.reads.views} numbers, but "
                f"{self.model.kind} gives {gives[0]} and {gives[1]}; set model.memory.geometry_width={gives[0]} and "
                f"model.memory.view_width={gives[1]}"
            )

    def __call__(self, pixels_ISSc: UInt8[np.ndarray, "I S S c"]) -> Geometry:
        grid = math.isqrt(self.reads.patches)
        seen = pictures(pixels_ISSc, grid * self.model.patch_size, self.fit)
        scene = self.model.scene(seen, confidence=self.by_confidence)
        return clip_geometry(scene, grid, self.scale, self.by_confidence)

    @property
    def made(self) -> dict[str, Any]:
        """All that the geometry depends on, beside what is seen."""
        told = {"model": self.model.kind, "digest": self.model.digest, "fit": self.fit, "scale": self.scale}
        return told | {"by_confidence": self.by_confidence}

    @property
    def digest(self) -> str:
        return hashlib.blake2b(json.dumps(self.made).encode(), digest_size=16).hexdigest()


def geometry_of(processor: Processor, source: str, fit: Fit = "crop") -> Seer:
    """The public model at `source`, for all that a processor shows. Raises ValueError where no memory reads it."""
    if processor.tile.geometry is None:
        raise ValueError("a model of geometry is for a memory that reads what it says; leave it out")
    if not isinstance(processor.image, FrameConfig):
        raise ValueError("a model of geometry is for models that see frames whole, not cut into tiles; leave it out")
    return Seer(load_geometry(source), processor.tile.geometry, fit)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What `store_clips` did."""

    written: int
    """Clips."""
    before: int
    """Clips that were there already."""
    skipped: list[str]
    """What was wrong with each sample whose clip was left out."""


def store_clips(
    samples: Samples,
    see: Callable[[np.ndarray], Geometry],
    made: Mapping[str, Any],
    out: str | os.PathLike,
    *,
    clips_a_file: int = CLIPS_A_FILE,
    values: Values = "bf16",
    part: tuple[int, int] = (0, 1),
    skip: bool = False,
    progress: Callable[[int, int], None] = lambda done, all: None,
) -> Stored:
    """Writes the geometry of every video and image of `samples` to the files of `out`, each clip once.

    Files that are complete are kept, so a call that was stopped goes on. `part` (i, n): every n-th file from i on, for
    one of n machines. `made`: what tells the model. Raises ValueError if `out` holds other clips or those of another
    model, and for what cannot be read, unless `skip`.
    """
    clips, skipped = _distinct(samples, skip)
    stem = split(out)
    stem[0].mkdir(parents=True, exist_ok=True)
    groups = [clips[first : first + clips_a_file] for first in range(0, len(clips), clips_a_file)]
    done = {"written": 0, "before": 0}
    mine = range(part[0], len(groups), part[1])
    total = sum(len(groups[n]) for n in mine)
    for number in mine:
        file, group = stem[0] / shard_name(stem[1], number, len(groups)), groups[number]
        if file.exists():
            _check_same(file, dict(made) | {"values": values}, [key for key, _ in group])
            done["before"] += len(group)
            progress(sum(done.values()), total)
            continue

        def seen(group: list[tuple[ClipKey, Key]] = group) -> Iterator[tuple[ClipKey, str, Geometry]]:
            for key, where in group:
                try:
                    yield key, *_see(samples, key, where, see)
                    done["written"] += 1
                except ValueError as error:
                    _leave_out(error, skipped, skip)
                progress(sum(done.values()), total)

        write_clips(file, made, values, seen())
    return Stored(**done, skipped=skipped)


def _distinct(samples: Samples, skip: bool) -> tuple[list[tuple[ClipKey, Key]], list[str]]:
    """Each clip that samples show, and one of those, in their order; and what is wrong with others."""
    clips: dict[str, tuple[ClipKey, Key]] = {}
    skipped: list[str] = []
    for file, lines in enumerate(samples.files):
        for line in range(len(lines)):
            try:
                record = lines.header(line)
                with naming(record.name):
                    taken = samples.frames((file, line), record) if record.video else None
                    for key in samples.clips((file, line), record, taken):
                        first, _ = clips.setdefault(key.name, (key, (file, line)))
                        if first != key:
                            raise ValueError(f"{key.name} must be one video with the same frames wherever it is named")
            except ValueError as error:
                _leave_out(error, skipped, skip)
    if not clips:
        raise ValueError("there must be a video or an image of which to make geometry, but no sample shows one")
    return list(clips.values()), skipped


def _leave_out(error: ValueError, skipped: list[str], skip: bool) -> None:
    """Remembers what is wrong with a sample that is left out. Raises ValueError, naming the flag, where none may be."""
    if not skip:
        raise ValueError(f"{error}; --skip-bad leaves out what cannot be read") from error
    skipped.append(str(error))


def _see(samples: Samples, key: ClipKey, where: Key, see: Callable[[np.ndarray], Geometry]) -> tuple[str, Geometry]:
    """The mark of a clip's file, and its geometry."""
    record, processor = samples.files[where[0]][where[1]], samples.processor
    with naming(record.name):
        if record.video:
            file = samples.path(where, record.video)
            taken, chosen = samples.frames(where, record)
            frames = video.read_frames(file, chosen, processor.open_limit, processor.image)
            shown = {"videos": [taken.video(frames, chosen)]}
        else:
            file = samples.path(where, record.images[[str(one) for one in record.images].index(key.name)])
            shown = {"images": [images.open_image(file, processor.open_limit, processor.image)]}
        geometry = see(processor.prompt("", **shown).pixels_ISSc)
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(geometry)):
            raise ValueError(f"the geometry of {key.name} holds numbers that are not finite")
        return mark_of(file), geometry


def _check_same(file: Path, made: Mapping[str, Any], keys: list[ClipKey]) -> None:
    """Raises ValueError, naming both, if a file that is there is not what would be written."""
    _, facts = open_shard(file, FORMAT)
    if facts["made"] != made:
        raise ValueError(f"{file} is of {facts['made']}, not of {made}; remove it or choose another --out")
    there = {ClipKey(name, tuple(frames), tuple(source)) for name, frames, source, _ in facts["clips"]}
    if there - set(keys):  # some may have been left out
        raise ValueError(f"{file} holds other clips than these data show; remove it or choose another --out")
