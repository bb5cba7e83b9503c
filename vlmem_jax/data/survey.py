"""What some data hold, and how they would be packed: for `vlmem data inspect`."""

import collections
import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vlmem_jax.data.config import DataConfig, SourceConfig
from vlmem_jax.data.plan import Plan, draws, ignored_keys
from vlmem_jax.data.samples import Key, Samples, open_lines
from vlmem_jax.processing import Processor, images, media, video
from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.processor import naming

BAR = 40
"""Characters of the longest bar of a histogram."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """Of one pass over all samples, each as often as the others."""

    tokens: np.ndarray
    """Of each usable sample."""
    tiles: np.ndarray
    """Of each usable sample, a blank tile included."""
    images: int
    """Images and video frames of the usable samples."""
    bad: dict[str, str]
    """What is wrong with each sample that cannot be used, by `file:line`."""
    packing: str
    """Rows and fill rates."""
    ignored: Mapping[str, int]
    """Keys of the lines that are not read, and in how many they stand."""

    def text(self) -> str:
        """Everything but the bad samples."""
        return "\n".join(
            [
                f"{len(self.tokens)} samples can be used, {len(self.bad)} cannot; {self.images} images",
                f"tokens of a sample, {_spread(self.tokens)}",
                *histogram(self.tokens),
                f"tiles of a sample, {_spread(self.tiles)}",
                *histogram(self.tiles),
                self.packing + ignored_keys(self.ignored),
            ]
        )


@dataclasses.dataclass(frozen=True)
class Glance:
    """Of the samples of a file, without tokenizer and model."""

    samples: int
    """That can be read."""
    frames: int
    """Of all videos."""
    pixels: np.ndarray
    """Of each image."""
    bad: dict[str, str]
    """What is wrong with each sample that cannot be read, by `file:line`."""
    ignored: Mapping[str, int]
    """As in `Survey`."""

    def text(self) -> str:
        """Everything but the bad samples."""
        lines = [
            f"{self.samples} samples can be read, {len(self.bad)} cannot; {len(self.pixels)} images, "
            f"{self.frames} frames in videos{ignored_keys(self.ignored)}"
        ]
        if len(self.pixels):
            lines += [f"pixels of an image, {_spread(self.pixels)}", *histogram(self.pixels)]
        return "\n".join(lines)


def glance(source: SourceConfig, threads: int, decode: bool = False) -> Glance:
    """Reads all lines of a file and the headers of its images, `threads` at a time; `decode`: the images, too, and some
    frames of videos."""
    lines = open_lines(source.path)

    def found_at(path: str) -> os.PathLike:
        return media.resolve(source.folder, path, source.follow_links)

    def read(index: int) -> tuple[list[int], int, tuple[str, ...]] | str:
        """Pixels of the images and frames of the video, and keys that are not read; or what is wrong."""
        try:
            record = lines[index] if decode else lines.header(index)
            with naming(record.name):
                if record.video:
                    file = record.video if isinstance(record.video, Encoded) else found_at(record.video)
                    clip = record.clip or video.probe(file)
                    if decode:
                        video.check_decodes(file, clip)
                    return [], clip.frames, record.ignored
                files = [path if isinstance(path, Encoded) else found_at(path) for path in record.images]
                heads = list(map(images.read_head, files)) if record.heads is None else record.heads
                if decode:
                    for file in files:
                        images.open_image(file)
                return [head.width * head.height for head in heads], 0, record.ignored
        except ValueError as error:
            return str(error)

    pixels, frames, bad, ignored = [], 0, {}, collections.Counter()
    with ThreadPoolExecutor(threads) as executor:
        for index, result in enumerate(executor.map(read, range(len(lines)))):
            if isinstance(result, str):
                bad[lines.name(index)] = result
            else:
                pixels += result[0]
                frames += result[1]
                ignored.update(result[2])
    return Glance(len(lines) - len(bad), frames, np.array(pixels, int), bad, ignored)


def survey(
    sources: Sequence[SourceConfig], config: DataConfig, processor: Processor, seed: int | None, decode: bool = False
) -> Survey:
    """Measures all samples of `sources` and packs them once; `decode`: makes each as training does, too.

    Raises ValueError if none can be used.
    """
    config = dataclasses.replace(config, on_bad_sample="skip")
    samples = Samples(sources, config, processor, seed)
    counts = [len(file) for file in samples.files]
    plan = Plan(samples, itertools.islice(draws(counts, [1.0] * len(counts), seed or 0), sum(counts)))
    plan.extend()
    keys = [key for row in range(len(plan)) for key in plan.row(row)]
    bad = dict(plan.skipped)
    if decode:

        def problem(key: Key) -> str | None:
            try:
                samples.load(key)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(config.thread_count) as executor:
            found = zip(keys, executor.map(problem, keys), strict=True)
            bad |= {samples.name(key): reason for key, reason in found if reason}
        keys = [key for key in keys if samples.name(key) not in bad]
    if not keys:
        raise ValueError(f"no sample of the data can be used; one of them: {next(iter(bad.values()))}")
    sizes = np.array([samples.size(key) for key in keys])
    packing = plan.report().partition("; ")[2].partition("; ")[0]
    return Survey(
        tokens=sizes[:, 0],
        tiles=sizes[:, 1],
        images=int(sizes[:, 3].sum()),
        bad=bad,
        packing=f"packed into {len(plan)} rows of {config.pack_tokens} tokens and {config.pack_tiles} tiles: {packing}",
        ignored=samples.ignored,
    )


def histogram(values: np.ndarray) -> list[str]:
    """A line for each power of two: the range, how many values lie in it, a bar."""
    groups = np.ceil(np.log2(values + 1)).astype(int)  # 0; 1; 2, 3; 4 ... 7; ...
    counts = np.bincount(groups)
    lines = []
    for group in range(int(groups.min()), len(counts)):
        low, high = (1 << group) // 2, (1 << group) - 1
        bar = "#" * -(-BAR * int(counts[group]) // int(counts.max()))
        lines.append(f"  {low:>8} to {high:<8} {counts[group]:>10}  {bar}".rstrip())
    return lines


def _spread(values: np.ndarray) -> str:
    low, median, high, most = np.percentile(values, (0, 50, 95, 100)).astype(int).tolist()
    return f"at least {low}, median {median}, 95 % up to {high}, at most {most}:"
