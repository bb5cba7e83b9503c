"""Frames of a memory as JPEG files, each named by what it holds."""

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlmem_jax.processing.images import open_image

NAME = re.compile(r"[0-9a-f]{32}")


class FrameFiles:
    """The files below a folder; one that is there is whole, and equal frames are one file."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._grown: set[Path] = set()

    def write(self, jpeg: bytes) -> str:
        """Keeps a file, and gives its name. Raises OSError, as of a full disk, and then there is nothing of it."""
        name = hashlib.blake2b(jpeg, digest_size=16).hexdigest()
        path = self.path(name)
        if path.exists():
            return name
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(unfinished, "wb") as file:
                file.write(jpeg)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._grown |= {path.parent, self.folder}
        return name

    def settle(self) -> None:
        """Has the disk hold the names of all that was written, before anything refers to them."""
        while self._grown:
            descriptor = os.open(self._grown.pop(), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def path(self, name: str) -> Path:
        """The file of a frame. Raises ValueError for what is no name of one: it may come from a file of others."""
        if not NAME.fullmatch(name):
            raise ValueError(f"a frame is named by 32 hexadecimal digits, got {name!r:.60}")
        return self.folder / name[:2] / f"{name}.jpg"

    def read(self, name: str) -> bytes:
        """What a file holds. Raises OSError."""
        return self.path(name).read_bytes()

    def image(self, name: str) -> Image.Image:
        """The picture. Raises ValueError if it cannot be decoded."""
        return open_image(self.path(name))

    def is_whole(self, name: str) -> bool:
        """Whether a file is there and holds what it is named by."""
        with contextlib.suppress(OSError):
            return hashlib.blake2b(self.read(name), digest_size=16).hexdigest() == name
        return False

    def files(self) -> Iterator[tuple[str, Path]]:
        """Every file with its name; unfinished ones and strange ones have none."""
        for path in sorted(self.folder.glob("*/*")) if self.folder.is_dir() else ():
            yield path.stem if path.suffix == ".jpg" and NAME.fullmatch(path.stem) else "", path
