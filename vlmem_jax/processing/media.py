"""Files of images and videos before anything decodes them: what they are by their first bytes."""

import os
import pathlib
import re
import stat
from typing import NamedTuple

from PIL import Image

LONGEST_NAME = 110
"""Characters of a name that a message shows."""
_HEAD = 16
"""Bytes that Pillow tells a format by."""
_BEGINNINGS = {
    b"ffconcat": "a list of other files (ffconcat)",
    b"#EXTM3U": "a playlist (M3U8)",
    b"v=0": "the description of a session (SDP)",
    b"<?xml": "XML, perhaps SVG, which is no picture of pixels; export it as PNG",
    b"<svg": "SVG, which is no picture of pixels; export it as PNG",
    b"<!doctype": "a web page (HTML), perhaps of an error; download the file again",
    b"<!DOCTYPE": "a web page (HTML), perhaps of an error; download the file again",
    b"<html": "a web page (HTML), perhaps of an error; download the file again",
    b"version https:": "a git-lfs pointer, not the file itself; `git lfs pull` fetches it",
    b"\x1f\x8b": "compressed by gzip; `gunzip` unpacks it",
    b"PK\x03\x04": "a zip archive; `unzip` unpacks it",
    b"{": "JSON",
    b"%PDF": "PDF",
    b"\x1aE\xdf\xa3": "MKV or WEBM",
}


class Encoded(NamedTuple):
    """An image or video file that was read already."""

    name: str
    """What it was called."""
    data: bytes

    def __str__(self) -> str:
        return self.name


def resolve(root: str | os.PathLike, path: str, follow_links: bool = False) -> pathlib.Path:
    """`path` below `root`, links followed. Raises ValueError if it leads out of `root`, by links unless they may."""
    if found := _NO_PATH.match(path):
        is_data, is_home = found[0].lower() == "data", found[0] == "~"
        what = "is an address; name a file on this machine"
        if is_data:
            what = "holds a file itself; `vlmem data convert` writes it to one"
        elif is_home:
            what = "needs a shell to be read; write the folder out"
        raise ValueError(f"{cut(path)!r} is no path: it {what}")
    inside = pathlib.Path(root).resolve()
    lexical = pathlib.Path(os.path.normpath(inside / path))
    try:
        full = lexical if follow_links else (inside / path).resolve()
    except (OSError, RuntimeError) as error:  # a circle of links
        raise ValueError(
            f"{cut(path)!r} cannot be followed: {getattr(error, 'strerror', None) or 'links in a circle'}"
        ) from error
    if not full.is_relative_to(inside):
        by_link = lexical.is_relative_to(inside)
        hint = "set follow_links of the file in data.train, or --follow-links" if by_link else "change root"
        raise ValueError(
            f"data may only name files below its root {inside}, but {cut(path)!r} leads to {cut(str(full))}; {hint}"
        )
    return full


_NO_PATH = re.compile(r"data(?=:)|file(?=:)|[a-z][a-z0-9+.-]*(?=://)|~(?=/|$)", re.IGNORECASE)


def cut(text: str) -> str:
    """A text as a message shows it, shortened in its midst."""
    return text if len(text) <= LONGEST_NAME else f"{text[:60]}...{text[-40:]}"


def check_file(path: str | os.PathLike | Encoded, kind: str) -> None:
    """Raises ValueError, naming `kind` and path, for what is not there, or no file: a pipe would hang."""
    if isinstance(path, Encoded):
        return
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise ValueError(f"{kind} {cut(str(path))} does not exist") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{kind} {cut(str(path))} cannot be opened: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{kind} {cut(str(path))} cannot be opened: it is {_kind_of(mode)}, no file")


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
    return kinds.get(stat.S_IFMT(mode), "something else")


def described(path: str | os.PathLike | Encoded) -> str | None:
    """What a file is, as far as its first bytes tell, to stand behind its name."""
    if isinstance(path, Encoded):
        head, size = path.data[:_HEAD], len(path.data)
    else:
        with open(path, "rb") as file:
            head, size = file.read(_HEAD), os.fstat(file.fileno()).st_size
    if not size:
        return "is empty (0 bytes)"
    if found := next((kind for start, kind in _BEGINNINGS.items() if head.startswith(start)), None):
        return f"is {found}"
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "is HEIC, of a phone; convert it to JPEG"
    if head[4:8] == b"ftyp" and head[8:11] != b"avi":
        return "is MP4 or MOV"
    Image.init()
    for kind in Image.ID:
        accepts = Image.OPEN[kind][1]
        if accepts and accepts(head.ljust(_HEAD, b"\0")) is True:
            return f"is {kind}"
    return None
