"""Files of images and videos before anything decodes them: what they are by their first bytes."""

import os
from typing import NamedTuple

from PIL import Image

_HEAD = 16
"""Bytes that Pillow tells a format by."""
_BEGINNINGS = {
    b"ffconcat": "a list of other files (ffconcat)",
    b"#EXTM3U": "a playlist (M3U8)",
    b"v=0": "the description of a session (SDP)",
    b"<?xml": "XML",
    b"<svg": "SVG",
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
    if head[4:8] == b"ftyp" and head[8:11] != b"avi":
        return "is MP4 or MOV"
    Image.init()
    for kind in Image.ID:
        accepts = Image.OPEN[kind][1]
        if accepts and accepts(head.ljust(_HEAD, b"\0")) is True:
            return f"is {kind}"
    return None
