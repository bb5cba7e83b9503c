"""Samples in ArrayRecord files, made by `vlmem data pack`: a pod reads few large files, and a plan little of each.

A file of n samples holds 2 n + 1 records. Record i is a line of JSON, then the files that the sample needs, one after
the other. Record n + i is that line alone, with all that a plan needs to know. The last record tells of the file.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vlmem_jax.data.config import SourceConfig
from vlmem_jax.data.jsonl import JsonLines, Record, as_record
from vlmem_jax.processing import images, media, video
from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.processor import naming
from vlmem_jax.processing.video import Clip

SUFFIX = ".array_record"
FORMAT = "vlmem samples 3"
SHARD_BYTES = 10**9
"""Size after which a file is closed and the next begun."""
READ_AT_ONCE = 64
"""Samples whose files are read by threads at the same time."""


class PackedLines:
    """The samples of `NAME-00000-of-00009.array_record` and so on, given as `NAME.array_record`; as `JsonLines` is."""

    def __init__(self, path: str):
        """Opens all files. Raises ValueError if one is missing, damaged or of another kind."""
        self.path = path
        self._readers, self._first, digests = [], [0], []
        for file in shards(path):
            reader, facts = open_shard(file, FORMAT)
            self._readers.append(reader)
            self._first.append(self._first[-1] + facts["samples"])
            digests.append(facts["digest"])
        self.digest = hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest()
        """Of all samples, images included."""

    def __len__(self) -> int:
        return self._first[-1]

    def name(self, index: int) -> str:
        """`file:number` of sample `index`, counted from 1."""
        return f"{self.path}:{index + 1}"

    def header(self, index: int) -> Record:
        """The sample with sizes in place of images: a small read."""
        record, _ = self._record(index, small=True)
        return record

    def __getitem__(self, index: int) -> Record:
        """The sample with the bytes of its images. Raises ValueError if the file is damaged."""
        record, files = self._record(index, small=False)
        if record.video:
            return dataclasses.replace(record, video=files[0])
        return dataclasses.replace(record, images=tuple(files))

    def _record(self, index: int, small: bool) -> tuple[Record, list[Encoded]]:
        shard = bisect.bisect_right(self._first, index) - 1
        place, count = index - self._first[shard], self._first[shard + 1] - self._first[shard]
        try:
            [data] = self._readers[shard].read([place + count * small])
        except RuntimeError as error:
            raise ValueError(f"{self.name(index)}: the file is damaged: {error}") from error
        line, _, content = data.partition(b"\n")
        head = json.loads(line)
        record = as_record(f"{self.name(index)} ({head['from']})", head["line"])
        spans = itertools.pairwise(itertools.accumulate(head["bytes"], initial=0))
        names = (record.video,) if record.video else record.images
        files = [] if small else [Encoded(n, content[a:b]) for n, (a, b) in zip(names, spans, strict=True)]
        heads = tuple(images.Head(*one) for one in head["heads"])
        return dataclasses.replace(record, heads=heads, clip=head["clip"] and Clip(*head["clip"])), files


@dataclasses.dataclass(frozen=True)
class Packed:
    """What `pack` wrote."""

    files: list[Path]
    samples: int
    nbytes: int
    skipped: list[str]
    """What was wrong with each line that was left out."""


def pack(
    lines: JsonLines,
    source: SourceConfig,
    out: str | os.PathLike,
    shard_bytes: int = SHARD_BYTES,
    skip: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> Packed:
    """Writes the samples of a JSONL file with their images, found below the root of `source`, to the files of `out`.

    Files appear when all are complete. Raises ValueError for a line that cannot be read or whose image or video cannot
    be decoded, or leaves it out with `skip`; and if there are such files already.
    """
    folder, stem = split(out)
    if found := list(_matching(folder, stem)):
        raise ValueError(f"--out must not exist yet, but there is {found[0]}; remove it or choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    skipped: list[str] = []
    done: list[tuple[Path, int, int]] = []
    with contextlib.ExitStack() as cleaning:
        shard = None
        for index, result in enumerate(_read_all(lines, source)):
            progress(index)
            if isinstance(result, ValueError):
                if not skip:
                    raise ValueError(f"{result}; --skip-bad leaves out what cannot be read") from result
                skipped.append(str(result))
                continue
            if shard is None:
                unfinished = folder / f"{stem}-{len(done):05d}.tmp"
                cleaning.callback(unfinished.unlink, missing_ok=True)
                shard = Shard(unfinished)
            shard.add(*result)
            if shard.nbytes >= shard_bytes:
                done.append((shard.path, shard.close(), shard.nbytes))
                shard = None
        if shard is not None:
            done.append((shard.path, shard.close(), shard.nbytes))
        if not done:
            raise ValueError(f"no line of {lines.path} can be used; the first: {skipped[0]}")
        files = [folder / shard_name(stem, number, len(done)) for number in range(len(done))]
        for (unfinished, _, _), file in zip(done, files, strict=True):
            os.replace(unfinished, file)
    return Packed(files, sum(part[1] for part in done), sum(part[2] for part in done), skipped)


class Shard:
    """A file that samples are added to."""

    def __init__(self, path: Path):
        self.path, self.nbytes = path, 0
        self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")  # images are compressed already
        self._headers: list[bytes] = []
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, header: bytes, files: list[bytes]) -> None:
        """Adds a sample."""
        record = b"".join([header, b"\n", *files])
        self._headers.append(header)
        self._digest.update(record)
        self.nbytes += len(record)
        self._write(record)

    def close(self) -> int:
        """Completes the file; gives its number of samples."""
        for header in self._headers:
            self._write(header)
        facts = {"format": FORMAT, "samples": len(self._headers), "digest": self._digest.hexdigest()}
        self._write(json.dumps(facts).encode())
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error
        return len(self._headers)

    def _write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(f"{self.path} cannot be written: {error}") from error


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of one of `count` files, such as train-00003-of-00009.array_record."""
    return f"{stem}-{number:05d}-of-{count:05d}{SUFFIX}"


def shards(path: str | os.PathLike) -> list[Path]:
    """The files of `NAME.array_record`, in order. Raises ValueError unless all are there, of one set."""
    folder, stem = split(path)
    found = sorted(_matching(folder, stem))
    if not found:
        raise ValueError(f"data must be files such as {folder / shard_name(stem, 0, 1)}, but there is none")
    count = int(found[0].name.removesuffix(SUFFIX)[-5:])
    wanted = [folder / shard_name(stem, number, count) for number in range(count)]
    if wrong := sorted(set(wanted) ^ set(found)):
        what = "is missing" if wrong[0] in wanted else "is of another set"
        raise ValueError(f"{path} must have {count} files, but {wrong[0]} {what}; pack the data again")
    return wanted


def open_shard(file: Path, kind: str) -> tuple[ArrayRecordReader, dict[str, Any]]:
    """Reader of a file and what its last record tells. Raises ValueError if it is not of the format `kind`."""
    try:
        reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
        facts = json.loads(reader.read([max(reader.num_records() - 1, 0)])[0])
        if not isinstance(facts, dict) or facts.get("format") != kind:
            raise ValueError(f"its last record does not say {kind!r}")
    except (RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or was not written by `vlmem data`: {error}") from error
    return reader, facts


def split(path: str | os.PathLike) -> tuple[Path, str]:
    """Folder and NAME of `folder/NAME.array_record`. Raises ValueError for another kind of name."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"an ArrayRecord file must be named NAME{SUFFIX}, got {str(path)!r}")
    return path.parent, path.stem


def _matching(folder: Path, stem: str) -> Iterator[Path]:
    pattern = re.compile(re.escape(stem) + r"-\d{5}-of-\d{5}" + re.escape(SUFFIX))
    return (file for file in folder.glob(f"*{SUFFIX}") if pattern.fullmatch(file.name))


def _read_all(lines: JsonLines, source: SourceConfig) -> Iterator[tuple[bytes, list[bytes]] | ValueError]:
    """Header and files of every sample, or what is wrong with it."""
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as executor:
        for first in range(0, len(lines), READ_AT_ONCE):
            span = range(first, min(first + READ_AT_ONCE, len(lines)))
            yield from executor.map(lambda index: _read(lines, source, index), span)


def _read(lines: JsonLines, source: SourceConfig, index: int) -> tuple[bytes, list[bytes]] | ValueError:
    try:
        record = lines[index]
    except ValueError as error:
        return error
    names = (record.video,) if record.video else record.images
    clip, heads = None, []
    try:
        with naming(record.name):
            files = [_encoded(source, name) for name in names]
            if record.video:
                clip = video.probe(files[0])
                video.check_decodes(files[0], clip, images.PILLOW_PIXEL_LIMIT)
            else:
                heads = [images.read_head(file, images.PILLOW_PIXEL_LIMIT) for file in files]
                for file in files:
                    images.open_image(file, images.PILLOW_PIXEL_LIMIT)
    except ValueError as error:
        return error
    head = {
        "line": json.loads(lines.text(index)),
        "from": record.name,
        "bytes": [len(file.data) for file in files],
        "heads": heads,
        "clip": clip,
    }
    return json.dumps(head).encode(), [file.data for file in files]


def _encoded(source: SourceConfig, name: str) -> Encoded:
    path = media.resolve(source.folder, name, source.follow_links)
    media.check_file(path, "file")
    try:
        return Encoded(name, path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
