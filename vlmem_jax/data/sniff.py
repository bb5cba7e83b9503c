"""What a data file is by its first bytes, where it is not the JSONL that it is taken for, and what helps."""

import json
import os
import shlex

HEAD = 1 << 16
"""Bytes that are looked at."""


def not_jsonl(path: str | os.PathLike) -> str | None:
    """What a file is if it is no JSONL, with the command that helps; None where it may be."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        size = os.fstat(file.fileno()).st_size
    word, lines = (shlex.quote(os.fspath(text)) for text in (path, f"{os.path.splitext(path)[0]}_lines.jsonl"))
    convert = f"`vlmem data convert {word} --out {lines}` makes JSONL of it"
    for start, what, help in (
        (b"\x1f\x8b", "is compressed by gzip", f"`gunzip {word}` unpacks it"),
        (b"PK\x03\x04", "is a zip archive", f"`unzip {word}` unpacks it"),
        (b"PAR1", "is a parquet file", convert),
        (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "`git lfs pull` fetches it"),
        (b"\x89HDF", "is an HDF5 file", "write its rows as lines of JSON"),
    ):
        if head.startswith(start):
            return f"{what}; {help}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), perhaps of an error; download the file again"
    if text.startswith(b"["):
        return f"is one JSON array; {convert}"
    first = text.partition(b"\n")[0].strip()
    if first.startswith(b"{") and not _is_json(first) and _is_object(head if len(head) == size else None):
        return f"is pretty-printed JSON, one value over many lines; {convert}"
    return None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _is_object(text: bytes | None) -> bool:
    """Whether the first value of a text, of which the rest may be missing, goes over several lines."""
    if text is None:
        return True
    try:
        _, end = json.JSONDecoder().raw_decode(text.decode("utf-8", "replace").lstrip("\ufeff \t\r\n"))
    except (ValueError, RecursionError):
        return False
    return b"\n" in text[:end].strip()
