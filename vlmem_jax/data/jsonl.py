"""Conversations from JSONL files, found by line; every error names `file:line`."""

import array
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vlmem_jax.data.forms import read_line
from vlmem_jax.data.sniff import not_jsonl
from vlmem_jax.processing.images import Head
from vlmem_jax.processing.media import Encoded, check_file
from vlmem_jax.processing.video import Clip

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Record:
    """One line: a conversation and the paths of its images, or of its video."""

    name: str
    """`file:line`, counted from 1."""
    conversations: Sequence[Mapping[str, Any]]
    images: tuple[str | Encoded, ...] = ()
    video: str | Encoded | None = None
    heads: tuple[Head, ...] | None = None
    """Of the images, where they are known."""
    clip: Clip | None = None
    """What the header of the video says, where it is known."""
    ignored: tuple[str, ...] = ()
    """Keys of the line that mean nothing here."""


class JsonLines:
    """The lines of a JSONL file by number; blank lines do not count. Reading is safe from many threads."""

    def __init__(self, path: str):
        """Finds the lines. Raises ValueError if there is no such file or no line in it."""
        self.path = path
        self._starts, self._ends, self._numbers = array.array("q"), array.array("q"), array.array("q")
        check_file(path, "data file")
        try:
            self._file = open(path, "rb")  # noqa: SIM115 - stays open for as long as the object lives
        except OSError as error:
            raise ValueError(f"data must be a JSONL file that can be read; {path}: {error.strerror}") from error
        start, content = 0, hashlib.blake2b(digest_size=16)
        for number, line in enumerate(self._file, 1):
            content.update(line)
            if line.strip():
                self._starts.append(start)
                self._ends.append(start + len(line))
                self._numbers.append(number)
            start += len(line)
        self.digest = content.hexdigest()
        """Of the whole file."""
        if not self._starts:
            raise ValueError(f"data must have at least one sample, but {path} has no line")
        if found := not_jsonl(path):
            raise ValueError(f"data must be JSONL, but {path} {found}")

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        """`file:line` of sample `index`."""
        return f"{self.path}:{self._numbers[index]}"

    def text(self, index: int) -> bytes:
        """The line as it stands in the file."""
        return os.pread(self._file.fileno(), self._ends[index] - self._starts[index], self._starts[index])

    def header(self, index: int) -> Record:
        """The sample, as far as a plan needs it: all of it."""
        return self[index]

    def __getitem__(self, index: int) -> Record:
        """The sample. Raises ValueError if its line is not a JSON object of the expected form."""
        return self.read(index, as_record)

    def read(self, index: int, form: Callable[[str, Any], T]) -> T:
        """What `form(name, value)` makes of the value on a line. Raises ValueError, naming it, for what is no JSON."""
        name = self.name(index)
        try:
            return form(name, json.loads(self.text(index)))
        except json.JSONDecodeError as error:
            if self.text(index).rstrip().endswith(b"},"):
                raise ValueError(f"{name}: a line must be one JSON object, without a comma behind it") from error
            raise ValueError(f"{name}: a line must be one JSON object; {error.msg} at column {error.colno}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: a line must be UTF-8; {error.reason} at byte {error.start + 1}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: {error}") from error


def as_record(name: str, fields: Any) -> Record:
    """A line that was parsed. Raises ValueError if it has none of the forms of `forms`."""
    said = read_line(fields, ABOUT)
    if len(said.videos) > 1:
        raise ValueError(f"a sample has one video at most, this one has {len(said.videos)}")
    if said.images and said.videos:
        raise ValueError("a sample has either `image` or `video`, this one has both")
    return Record(name, said.conversations, said.images, said.videos[0] if said.videos else None, ignored=said.ignored)


ABOUT = ("id", "source", "split", "dataset")
"""Keys that tell of a line and are not missed."""
