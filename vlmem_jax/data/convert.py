"""Data as people keep them to JSONL that training and evaluation read: for `vlmem data convert`.

Read are JSON arrays, JSONL, pretty-printed JSON and parquet, with conversations in any of the forms of `forms`, or as
alpaca has them (instruction, input, output). Images that a line holds itself, as base64 or bytes, become files.
"""

import base64
import binascii
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from vlmem_jax.data.forms import check_object, short
from vlmem_jax.data.values import values
from vlmem_jax.paths import write_whole
from vlmem_jax.processing.images import open_image, read_format
from vlmem_jax.processing.media import Encoded

_DATA = re.compile(r"data:[\w/+.-]*;base64,(.*)", re.DOTALL)
SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg"}
"""Endings of files by Pillow's name of a format, where they are not that in small letters."""


class Origin:
    """What is converted, and how it becomes lines: here, the values of a file as they stand there."""

    def values(self, source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
        """All values in order, each with its name. Raises ValueError for what cannot be read."""
        return values(source)

    def line(self, value: Any) -> dict[str, Any]:
        """A value as a line. Raises ValueError for one that cannot be used."""
        check_object(value)
        return value


class Converted(NamedTuple):
    """The outcome of `convert`."""

    lines: int
    images: int
    """Files written, each once however many lines show it."""
    skipped: list[str]
    """The reason why each value that was left out was."""


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    images: str | os.PathLike | None = None,
    skip: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    origin: Origin | None = None,
) -> Converted:
    """Writes the values of `source` as lines of `out`, and the images that they hold into the folder `images`, which is
    `NAME_images` beside `out` if it is not given. Other paths stay as they are. `origin`: of a form that is no plain
    file of values.

    Raises ValueError, naming the value, for what cannot be used, or leaves it out with `skip`; and if `out` is there.
    """
    out = pathlib.Path(out)
    if out.exists():
        raise ValueError(f"--out must not exist yet, but there is {out}; remove it or choose another name")
    folder = pathlib.Path(images) if images is not None else out.with_name(f"{out.stem}_images")
    if not folder.resolve().is_relative_to(out.parent.resolve()):
        raise ValueError(
            f"--images must lie in the folder of --out, {out.parent}, from which paths are read; got {folder}"
        )
    origin = origin or Origin()
    written: set[str] = set()
    lines, skipped = [], []
    for number, (name, value) in enumerate(origin.values(source), 1):
        progress(number)
        try:
            line = _line(origin.line(value), lambda data: _keep(data, folder, out.parent, written))
        except ValueError as error:
            reason = f"{name}: {error}"
            if not skip:
                raise ValueError(f"{reason}; --skip-bad leaves out what cannot be used") from error
            skipped.append(reason)
            continue
        lines.append(json.dumps(line, ensure_ascii=False))
    if not lines:
        raise ValueError(
            f"{source} holds no value that can be used" + (f"; the first: {skipped[0]}" if skipped else "")
        )
    write_whole(out, ("\n".join(lines) + "\n").encode(errors="surrogatepass"))
    return Converted(len(lines), len(written), skipped)


def _line(value: dict[str, Any], keep: Callable[[bytes], str]) -> dict[str, Any]:
    """A value as a line: alpaca's keys as a conversation, files that it holds as paths."""
    line = {key: held for key, held in value.items() if held is not None}
    if not line.keys() & {"conversations", "messages", "prompt"} and {"instruction", "output"} <= line.keys():
        asked, more, said = line.pop("instruction"), line.pop("input", ""), line.pop("output")
        if not all(isinstance(text, str) for text in (asked, more, said)):
            raise ValueError(f"`instruction`, `input` and `output` must be texts, got {short([asked, more, said])}")
        turns = [("human", f"{asked}\n{more}" if more else asked), ("gpt", said)]
        line["conversations"] = [{"from": speaker, "value": text} for speaker, text in turns]
    return {key: _held(held, keep) for key, held in line.items()}


def _held(value: Any, keep: Callable[[bytes], str]) -> Any:
    """A value of a line, in which files that are held, at any depth, are paths."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes | str) and value.keys() <= {"bytes", "path"}:
            return keep(value["bytes"] if isinstance(value["bytes"], bytes) else _decoded(value["bytes"]))
        if value.keys() == {"path", "bytes"}:
            return value["path"]
        return {key: _held(one, keep) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_held(one, keep) for one in value]
    if isinstance(value, bytes):
        return keep(value)
    if isinstance(value, str) and (found := _DATA.fullmatch(value)):
        return keep(_decoded(found[1]))
    return value


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"an image must be base64, got {short(text)}") from error


def _keep(data: bytes, folder: pathlib.Path, root: pathlib.Path, written: set[str]) -> str:
    """Path, from `root`, of the file of these bytes, which is written if it is new. Raises ValueError for no image."""
    name = hashlib.blake2b(data, digest_size=12).hexdigest()
    file = Encoded("in the line", data)
    open_image(file)  # is whole
    kind = read_format(file)
    path = folder / f"{name}{SUFFIXES.get(kind, f'.{kind.lower()}')}"
    if name not in written:
        write_whole(path, data)
        written.add(name)
    return os.path.relpath(path, root)
