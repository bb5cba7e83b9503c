"""The samples of some JSONL files: their sizes without decoding an image, and the samples themselves."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from vlmem_jax.data.config import DataConfig, SourceConfig
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.processing import Processor, images, video
from vlmem_jax.types import IGNORED, Sample

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
        self.files = [JsonLines(source.path) for source in sources]
        self.roots = [source.root or os.path.dirname(source.path) or "." for source in sources]
        self.weights = [source.weight for source in sources]
        self._sizes = [np.zeros((len(lines), len(Size._fields)), np.int32) for lines in self.files]
        self._errors: dict[Key, str] = {}

    def name(self, key: Key) -> str:
        """`file:line` of a sample."""
        return self.files[key[0]].name(key[1])

    def size(self, key: Key) -> Size:
        """Size of a sample that was measured. Raises ValueError if it cannot be used."""
        if key in self._errors:
            raise ValueError(self._errors[key])
        return Size(*self._sizes[key[0]][key[1]].tolist())

    def measure(self, keys: Sequence[Key]) -> None:
        """Measures those samples that were not yet, `data.threads` at a time."""
        new = [key for key in dict.fromkeys(keys) if key not in self._errors and not self._sizes[key[0]][key[1], 0]]
        if not new:
            return
        with ThreadPoolExecutor(self.config.thread_count) as executor:
            for key, result in zip(new, executor.map(self._measure, new), strict=True):
                if isinstance(result, str):
                    self._errors[key] = result
                else:
                    self._sizes[key[0]][key[1]] = result

    def load(self, key: Key, augment: np.random.Generator | None = None) -> Sample:
        """A sample with its images decoded, of the size that was measured; else raises ValueError.

        `augment` draws the quality of a JPEG round trip for each image.
        """
        record = self.files[key[0]][key[1]]
        with _naming(record.name):
            limit = self.processor.image.max_pixels
            if record.video:
                path = self._path(key, record.video)
                pictures = video.read_frames(path, self._frames(key, path), limit)
            else:
                pictures = [images.open_image(self._path(key, path), limit) for path in record.images]
        if augment is not None:
            pictures = [images.jpeg_round_trip(picture, int(augment.integers(75, 101))) for picture in pictures]
        sample = self.processor.encode(
            record.conversations,
            pictures,
            video=record.video is not None,
            mask_text_only=self.config.mask_text_only,
            name=record.name,
        )
        targets = int((sample.labels_T != IGNORED).sum())
        found, planned = Size(len(sample.tokens_T), len(sample.pixels_ISSc), targets, len(pictures)), self.size(key)
        if found != planned:
            raise ValueError(
                f"data must not change under a run, but {planned} was planned and now it is {found} "
                f"(sample {record.name}); start again"
            )
        return sample

    def _measure(self, key: Key) -> Size | str:
        """The size, or what is wrong with the sample."""
        try:
            record = self.files[key[0]][key[1]]
            with _naming(record.name):
                if record.video:
                    frames = self._frames(key, self._path(key, record.video))
                    image_sizes = [(1, 1)] * len(frames)  # a frame is one tile whatever its shape
                else:
                    limit = self.processor.image.max_pixels
                    image_sizes = [images.image_size(self._path(key, path), limit) for path in record.images]
            plan = self.processor.plan(
                record.conversations,
                image_sizes,
                video=record.video is not None,
                mask_text_only=self.config.mask_text_only,
                name=record.name,
            )
            size = Size(plan.tokens, plan.tiles, plan.targets, len(image_sizes))
            with _naming(record.name):
                self._check_limits(size)
            return size
        except ValueError as error:
            return str(error)

    def _check_limits(self, size: Size) -> None:
        config = self.config
        longest = min(config.max_sample_tokens, config.pack_tokens)
        if size.tokens > longest:
            knob = "max_sample_tokens" if config.max_sample_tokens == longest else "pack_tokens"
            raise ValueError(f"a sample may have {longest} tokens but this one has {size.tokens}; raise data.{knob}")
        if size.tiles > config.pack_tiles:
            raise ValueError(
                f"a row has {config.pack_tiles} tiles but this sample has {size.tiles}; "
                "raise data.pack_tiles or lower image.max_tiles"
            )
        if not size.targets:
            raise ValueError("a sample must have an answer to learn, but this one has no target token")

    def _path(self, key: Key, path: str) -> os.PathLike:
        return images.resolve(self.roots[key[0]], path)

    def _frames(self, key: Key, path: os.PathLike) -> list[int]:
        """Which frames the sample takes of its video: the same each time it is seen."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, *key])
        return video.choose_frames(video.frame_count(path), self.config.min_frames, self.config.max_frames, rng)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Adds the sample's name to a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (sample {name})") from error
