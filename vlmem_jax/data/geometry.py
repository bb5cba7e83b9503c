"""Geometry of videos in ArrayRecord files, made by `vlmem data geometry`: a clip a record, read whole by training.

Of n clips, record i is a line of JSON, then the arrays of the clip one after the other. The last record tells of the
file: what made it, and of each clip its name, frames, size and shape, so that a plan reads nothing else.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from vlmem_jax.data.config import SourceConfig
from vlmem_jax.data.records import open_shard, shards
from vlmem_jax.processing import Processor
from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.video import Clip
from vlmem_jax.types import Geometry, GeometryShape, Sample

FORMAT = "vlmem geometry 1"
MAKE = "`vlmem data geometry`"
END = 1 << 16
"""Bytes at both ends of a video that tell it from others."""
Values = Literal["bf16", "int8"]
"""How tokens are kept: as they are, or rounded to 255 steps of the largest number of each."""


@dataclasses.dataclass(frozen=True)
class ClipKey:
    """The frames of a video, or an image, that geometry is known of."""

    name: str
    """As a line of the data names it."""
    frames: tuple[int, ...]
    source: tuple[int, int, int]
    """Of the file: its frames, their width and their height."""


def video_clip(name: str, clip: Clip, chosen: Sequence[int]) -> ClipKey:
    """The key of `chosen` frames of a video."""
    return ClipKey(name, tuple(chosen), (clip.frames, clip.width, clip.height))


def image_clip(name: str, size: tuple[int, int]) -> ClipKey:
    """The key of an image of this width and height: a clip of one frame."""
    return ClipKey(name, (0,), (1, *size))


class GeometryStore:
    """The clips of `NAME.array_record`, by the name of their video. Reading is safe from many threads."""

    def __init__(self, path: str):
        """Opens all files. Raises ValueError if one is missing, damaged, or made by another model than the others."""
        self.path, self.made = path, {}
        self._clips: dict[str, tuple[Any, int, ClipKey, GeometryShape]] = {}
        told = hashlib.blake2b(digest_size=16)
        for file in shards(path):
            reader, facts = open_shard(file, FORMAT)
            self.made = self.made or facts["made"]
            if facts["made"] != self.made:
                raise ValueError(
                    f"{path} must be made at once, but {file} says {facts['made']}, and others {self.made}"
                )
            for place, (name, frames, source, shape) in enumerate(facts["clips"]):
                key = ClipKey(name, tuple(frames), tuple(source))
                self._clips[name] = reader, place, key, GeometryShape(*shape)
            told.update(json.dumps(facts).encode())
        self.digest = told.hexdigest()
        """Of what made it, and of its clips."""

    def __len__(self) -> int:
        return len(self._clips)

    def check(self, wanted: ClipKey, reads: GeometryShape) -> None:
        """Raises ValueError, naming both, unless there is a clip of these frames, and of the shape that is read."""
        if wanted.name not in self._clips:
            raise ValueError(f"{self.path} has no geometry of {wanted.name}; make it by {MAKE} of the same data")
        _, _, found, shape = self._clips[wanted.name]
        if found.frames != wanted.frames:
            raise ValueError(
                f"{self.path} has geometry of frames {_few(found.frames)} of {wanted.name}, but {_few(wanted.frames)} "
                f"are taken now; set image.frames and image.sampling as they were, or make it again by {MAKE}"
            )
        if found.source != wanted.source:
            raise ValueError(
                f"{self.path} has geometry of a {wanted.name} of {_sized(found.source)}, but now it has "
                f"{_sized(wanted.source)}; make it again by {MAKE}"
            )
        if shape != reads:
            raise ValueError(
                f"{self.path} has {shape.patches} patches a frame, tokens of {shape.tokens} and views of {shape.views} "
                f"numbers, but the model reads {reads.patches}, {reads.tokens} and {reads.views}; set "
                f"memory.geometry_width={shape.tokens} and memory.view_width={shape.views}, or make it again by {MAKE}"
            )

    def read(self, wanted: ClipKey, file: os.PathLike | Encoded, reads: GeometryShape) -> Geometry:
        """The clip, one leading axis of frames. Raises ValueError as `check`, if `file` is not the one that it was made
        of, and if the store is damaged."""
        self.check(wanted, reads)
        reader, place, *_ = self._clips[wanted.name]
        try:
            [data] = reader.read([place])
        except RuntimeError as error:
            raise ValueError(f"{self.path} is damaged at {wanted.name}: {error}") from error
        line, _, content = data.partition(b"\n")
        mark, arrays = json.loads(line)
        if mark != mark_of(file):
            raise ValueError(
                f"{self.path} has geometry of another file of the name {wanted.name}; make it again by {MAKE}"
            )
        sizes = [int(np.prod(shape)) * jnp.dtype(dtype).itemsize for dtype, shape in arrays]
        spans = itertools.pairwise(itertools.accumulate(sizes, initial=0))
        tokens, views, coords, *scales = (
            np.frombuffer(content[first:last], jnp.dtype(dtype)).reshape(shape)
            for (dtype, shape), (first, last) in zip(arrays, spans, strict=True)
        )
        if scales:
            tokens, views = ((x * scale).astype(jnp.bfloat16) for x, scale in zip((tokens, views), scales, strict=True))
        return Geometry(tokens, views, coords)


def stores_of(sources: Sequence[SourceConfig], processor: Processor) -> list[GeometryStore | None]:
    """The store of each source that names one, where the model reads geometry."""
    reads = processor.tile.geometry is not None
    return [GeometryStore(source.geometry) if reads and source.geometry else None for source in sources]


def write_clips(
    file: Path, made: Mapping[str, Any], values: Values, clips: Iterable[tuple[ClipKey, str, Geometry]]
) -> None:
    """Writes a file of clips, each with the mark of its file; it appears when it is complete. `made`: what tells the
    model that made it.

    Raises OSError where it cannot be written, and what `clips` raises.
    """
    unfinished, told = file.with_suffix(".tmp"), []
    with contextlib.ExitStack() as cleaning:
        cleaning.callback(unfinished.unlink, missing_ok=True)
        try:
            writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
            cleaning.callback(lambda: writer.is_open() and writer.close())
            for key, mark, geometry in clips:
                arrays = _arrays(geometry, values)
                head = json.dumps([mark, [[str(x.dtype), x.shape] for x in arrays]]).encode()
                writer.write(b"\n".join([head, b"".join(x.tobytes() for x in arrays)]))
                told.append([*dataclasses.astuple(key), shape_of(geometry)])
            writer.write(
                json.dumps({"format": FORMAT, "made": dict(made) | {"values": values}, "clips": told}).encode()
            )
            writer.close()
        except RuntimeError as error:
            raise OSError(f"{file} cannot be written: {error}") from error
        os.replace(unfinished, file)


def mark_of(file: os.PathLike | Encoded) -> str:
    """What tells a file from others of its name: its size and its ends, since a video is long to read."""
    with io.BytesIO(file.data) if isinstance(file, Encoded) else open(file, "rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        told = hashlib.blake2b(str(size).encode(), digest_size=16)
        for place in (0, max(size - END, 0)):
            opened.seek(place)
            told.update(opened.read(END))
    return told.hexdigest()


def shape_of(geometry: Geometry) -> GeometryShape:
    """How much is known of a frame."""
    *_, N, G = geometry.tokens_BNG.shape
    return GeometryShape(N, G, geometry.views_BNV.shape[-1])


def with_geometry(sample: Sample, clips: Sequence[Geometry]) -> Sample:
    """The sample with the geometry of the clips that it shows, in their order; as it is where it shows none.

    Raises ValueError where it has other tiles than they have frames.
    """
    if not clips:
        return sample
    geometry = Geometry(*(np.concatenate(parts) for parts in zip(*map(jax.tree.leaves, clips), strict=True)))
    if (frames := len(geometry.coords_BN3)) != (tiles := len(sample.pixels_ISSc)):
        raise ValueError(
            f"geometry is known of frames that are seen whole, each a tile, but {frames} frames have become {tiles} "
            f"tiles (sample {sample.name}); set image.max_tiles=1, or memory.geometry_width=0"
        )
    return dataclasses.replace(sample, geometry=geometry)


def _arrays(geometry: Geometry, values: Values) -> list[np.ndarray]:
    tokens, views = (np.asarray(x) for x in (geometry.tokens_BNG, geometry.views_BNV))
    coords = np.asarray(geometry.coords_BN3, np.float32)
    if values == "bf16":
        return [tokens.astype(jnp.bfloat16), views.astype(jnp.bfloat16), coords]
    (tokens, token_scales), (views, view_scales) = map(_rounded, (tokens, views))
    return [tokens, views, coords, token_scales, view_scales]


def _rounded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.rint(x / np.where(scale > 0, scale, 1)).astype(np.int8), scale


def _sized(source: tuple[int, int, int]) -> str:
    frames, width, height = source
    return f"{frames} frames of {width}x{height}"


def _few(frames: Sequence[int]) -> str:
    """The first of many numbers."""
    return f"{', '.join(map(str, frames[:4]))}{', ...' * (len(frames) > 4)} ({len(frames)})"
