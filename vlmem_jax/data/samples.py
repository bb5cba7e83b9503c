"""The samples of some JSONL or ArrayRecord files: their sizes without decoding an image, and the samples themselves."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from vlmem_jax.data.config import DataConfig, SourceConfig
from vlmem_jax.data.geometry import ClipKey, image_clip, stores_of, video_clip, with_geometry
from vlmem_jax.data.jsonl import JsonLines, Record
from vlmem_jax.data.records import SUFFIX, PackedLines
from vlmem_jax.processing import Processor, images, media, video
from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.processor import naming
from vlmem_jax.runtime import hosts
from vlmem_jax.types import IGNORED, Geometry, Sample

Key = tuple[int, int]
"""Number of a file, and of a sample in it."""


class Size(NamedTuple):
    """What a sample takes of a row."""

    tokens: int
    tiles: int
    targets: int
    """Tokens that the loss counts."""
    images: int
    """Images or video frames; none in a sample whose one tile is blank."""


class Samples:
    """Random access to the samples of `sources`. What was measured once is remembered."""

    def __init__(
        self, sources: Sequence[SourceConfig], config: DataConfig, processor: Processor, seed: int | None = None
    ):
        """Finds the lines of every file. `seed` draws frames of videos; None takes `data.max_frames`, evenly spaced."""
        if not sources:
            raise ValueError("there must be at least one JSONL file to read; set data.train, or data.eval to evaluate")
        self.config, self.processor, self.seed = config, processor, seed
        self.sources = sources
        self.files = [open_lines(source.path) for source in sources]
        self.weights = [source.weight for source in sources]
        self.reads, self.stores = processor.tile.geometry, stores_of(sources, processor)
        self._sizes = [np.zeros((len(lines), len(Size._fields)), np.int32) for lines in self.files]
        self._errors: dict[Key, str] = {}
        self.ignored: collections.Counter[str] = collections.Counter()
        """Keys of the lines measured so far that mean nothing, and in how many they stand."""
        self.plan_file: str | None = None
        """Where what was measured is kept, if it is."""

    def name(self, key: Key) -> str:
        """`file:line` of a sample."""
        return self.files[key[0]].name(key[1])

    def size(self, key: Key) -> Size:
        """Size of a sample that was measured. Raises ValueError if it cannot be used."""
        if key in self._errors:
            raise ValueError(self._errors[key])
        return Size(*self._sizes[key[0]][key[1]].tolist())

    def measure(self, keys: Sequence[Key], together: bool = False) -> None:
        """Measures those samples that were not yet, `data.threads` at a time; `together`, each host does its part."""
        new = [key for key in dict.fromkeys(keys) if key not in self._errors and not self._sizes[key[0]][key[1], 0]]
        if not new:
            return
        count, host = (jax.process_count(), jax.process_index()) if together else (1, 0)
        with ThreadPoolExecutor(self.config.thread_count) as executor:
            results = list(executor.map(self._measure, new[host::count]))
        if together:
            parts = [json.loads(part) for part in hosts.gather(json.dumps(results).encode())]
            results = [parts[i % count][i // count] for i in range(len(new))]
        for key, (result, ignored) in zip(new, results, strict=True):
            if isinstance(result, str):
                self._errors[key] = result
            else:
                self._sizes[key[0]][key[1]] = result
            self.ignored.update(ignored)

    def measured(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Everything measured so far, for `remember`: sizes by file, and, ready for JSON, errors by `file:sample`, both
        as numbers, and ignored keys."""
        sizes = {f"sizes_{file}": sizes for file, sizes in enumerate(self._sizes)}
        errors = {f"{file}:{line}": error for (file, line), error in self._errors.items()}
        return sizes, {"errors": errors, "ignored": dict(self.ignored)}

    def errors(self) -> dict[str, str]:
        """What is wrong with samples that were measured, by `file:line`."""
        return {self.name(key): error for key, error in self._errors.items()}

    def used(self, files: Sequence[int], lines: Sequence[int]) -> np.ndarray:
        """[tokens, tiles] of all these samples together."""
        files, lines = np.asarray(files), np.asarray(lines)
        parts = [sizes[lines[files == file], :2].sum(0, np.int64) for file, sizes in enumerate(self._sizes)]
        return np.sum(parts, axis=0)

    def remember(self, sizes: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        """Takes what `measured` gave of the same files and config."""
        self._sizes = [sizes[f"sizes_{file}"] for file in range(len(self.files))]
        keys = (name.split(":") for name in facts["errors"])
        self._errors = {
            (int(file), int(line)): error for (file, line), error in zip(keys, facts["errors"].values(), strict=True)
        }
        self.ignored = collections.Counter(facts["ignored"])

    def load(self, key: Key, augment: np.random.Generator | None = None) -> Sample:
        """A sample with its images decoded, of the size that was measured; else raises ValueError.

        `augment` draws the quality of a JPEG round trip for each image.
        """
        record = self.files[key[0]][key[1]]
        with naming(record.name):
            limit, shown_as = self.processor.open_limit, self.processor.image
            if record.video:
                clip, chosen = seen = self.frames(key, record)
                pictures = video.read_frames(self.path(key, record.video), chosen, limit, shown_as)
            else:
                seen, pictures = (
                    None,
                    [images.open_image(self.path(key, path), limit, shown_as) for path in record.images],
                )
            geometry = self._geometry(key, record, seen)
        if augment is not None:
            pictures = [images.jpeg_round_trip(picture, int(augment.integers(75, 101))) for picture in pictures]
        shown = {"videos": [clip.video(pictures, chosen)]} if record.video else {"images": pictures}
        sample = self.processor.encode(
            record.conversations, **shown, mask_text_only=self.config.mask_text_only, name=record.name
        )
        sample = with_geometry(sample, geometry)
        targets = int((sample.labels_T != IGNORED).sum())
        found, planned = Size(len(sample.tokens_T), len(sample.pixels_ISSc), targets, len(pictures)), self.size(key)
        if found != planned:
            raise ValueError(
                f"data must not change under a run, but {planned} was planned and now it is {found} "
                f"(sample {record.name}); {f'remove {self.plan_file} and ' if self.plan_file else ''}start again"
            )
        return sample

    def _measure(self, key: Key) -> tuple[Size | str, tuple[str, ...]]:
        """The size, or what is wrong with the sample, and keys of its line that mean nothing."""
        try:
            record = self.files[key[0]].header(key[1])
            with naming(record.name):
                if record.video:
                    clip, chosen = seen = self.frames(key, record)
                    shown = {"video_sizes": [clip.taken(chosen, self.processor.image)]}
                else:
                    seen, shown = None, {"image_sizes": self._image_sizes(key, record)}
                self._clips_read(key, record, seen)
            plan = self.processor.plan(
                record.conversations, **shown, mask_text_only=self.config.mask_text_only, name=record.name
            )
            size = Size(plan.tokens, plan.tiles, plan.targets, len(chosen if record.video else shown["image_sizes"]))
            with naming(record.name):
                self._check_limits(size, record.video is not None)
            return size, record.ignored
        except ValueError as error:
            return str(error), ()

    def _check_limits(self, size: Size, is_video: bool) -> None:
        config = self.config
        longest = min(config.max_sample_tokens, config.pack_tokens)
        if size.tokens > longest:
            knob = "max_sample_tokens" if config.max_sample_tokens == longest else "pack_tokens"
            raise ValueError(f"a sample may have {longest} tokens but this one has {size.tokens}; raise data.{knob}")
        if size.tiles > config.pack_tiles:
            raise ValueError(
                f"a row has {config.pack_tiles} tiles but this sample has {size.tiles}; "
                f"raise data.pack_tiles or lower {self.processor.size_knobs[is_video]}"
            )
        if not size.targets:
            raise ValueError("a sample must have an answer to learn, but this one has no target token")

    def path(self, key: Key, path: str | Encoded) -> os.PathLike | Encoded:
        """Where a file that a sample names lies. Raises ValueError if it leads out of the root."""
        source = self.sources[key[0]]
        return path if isinstance(path, Encoded) else media.resolve(source.folder, path, source.follow_links)

    def clips(self, key: Key, record: Record, seen: tuple[video.Clip, list[int]] | None) -> list[ClipKey]:
        """What a sample shows, as a store of geometry knows it: its video, of which `frames` gave `seen`, or each image
        as a clip of one frame."""
        if seen is not None:
            return [video_clip(str(record.video), *seen)]
        sizes = self._image_sizes(key, record)
        return [image_clip(str(one), size) for one, size in zip(record.images, sizes, strict=True)]

    def _clips_read(self, key: Key, record: Record, seen: tuple[video.Clip, list[int]] | None) -> list[ClipKey]:
        """Clips whose geometry is read. Raises ValueError where it is not in the store."""
        if self.reads is None or not (record.video or record.images):
            return []
        if (store := self.stores[key[0]]) is None:
            raise ValueError(
                "the memory reads geometry of what it sees; set geometry of this file (data.train.0.geometry) to what "
                "`vlmem data geometry` made of it, or model.memory.geometry_width=0"
            )
        clips = self.clips(key, record, seen)
        for clip in clips:
            store.check(clip, self.reads)
        return clips

    def _geometry(self, key: Key, record: Record, seen: tuple[video.Clip, list[int]] | None) -> list[Geometry]:
        """That of each clip that a sample shows, where it is read."""
        if not (clips := self._clips_read(key, record, seen)):
            return []
        store, files = self.stores[key[0]], [record.video] if record.video else record.images
        return [store.read(clip, self.path(key, file), self.reads) for clip, file in zip(clips, files, strict=True)]

    def _image_sizes(self, key: Key, record: Record) -> list[tuple[int, int]]:
        limit, shown_as = self.processor.open_limit, self.processor.image
        if record.heads is None:
            return [images.image_size(self.path(key, path), limit, shown_as) for path in record.images]
        for path, head in zip(record.images, record.heads, strict=True):
            images.check_pixels(path, head[:2], limit)
        return [head.size(shown_as) for head in record.heads]

    def frames(self, key: Key, record: Record) -> tuple[video.Clip, list[int]]:
        """The video of a sample, and which frames it takes of it: the same each time it is seen."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, *key])
        clip = record.clip or video.probe(self.path(key, record.video))
        return clip, clip.at(self.processor.choose_frames(clip, self.config.min_frames, self.config.max_frames, rng))


def open_lines(path: str) -> JsonLines | PackedLines:
    """The samples of a file, by its name."""
    return PackedLines(path) if path.endswith(SUFFIX) else JsonLines(path)
