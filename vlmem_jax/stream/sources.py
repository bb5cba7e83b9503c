"""Files and folders as streams; what the user named as one is opened, and nothing that a file names."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from vlmem_jax.processing.images import FORMATS, open_image
from vlmem_jax.processing.media import cut
from vlmem_jax.processing.video import opened
from vlmem_jax.stream.decoding import decoded, errors, picture, reason
from vlmem_jax.stream.frames import Reading, Shown, Source, Times
from vlmem_jax.stream.live import ADDRESS, Live

NUMBER = re.compile(r"(\d+)")


def open_source(name: str, reading: Reading) -> Source:
    """What `name` means. Raises ValueError, naming it, for what cannot be opened."""
    kind = kind_of(name)
    if kind == "folder":
        return Folder(name, reading)
    return VideoFile(name, reading) if kind == "file" else Live(name, kind, reading)


def kind_of(name: str) -> str:
    """Whether `name` is that of an address, a device, a pipe, a folder or a file. Raises ValueError, naming it, for
    none of these."""
    if ADDRESS.match(name):
        return "address"
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError as error:
        what = "there is no camera" if name.startswith("/dev/") else "there is no file, folder or device"
        raise ValueError(f"--video {cut(name)}: {what} of this name") from error
    except OSError as error:
        raise ValueError(f"--video {cut(name)} cannot be opened: {error.strerror}") from error
    kinds = {stat.S_IFCHR: "device", stat.S_IFIFO: "pipe", stat.S_IFDIR: "folder"}
    return kinds.get(stat.S_IFMT(mode), "file")


class VideoFile:
    """A video file, decoded from its beginning to its end; nothing of it is kept."""

    live = False

    def __init__(self, name: str, reading: Reading):
        self.name, self._reading = name, reading
        with opened(name, reading.max_pixels) as (_, stream):  # a wrong file is found before anything else begins
            rate = float(stream.average_rate or 0)
        if rate and reading.fps > rate + 1e-6:
            reading.notes.add("pace", f"{name} has {rate:g} frames a second, fewer than --fps {reading.fps:g}: all are "
                              "looked at")  # fmt: skip

    def __iter__(self) -> Iterator[Shown]:
        ends = 0.0
        with opened(self.name) as (container, stream):
            stream.thread_type = "AUTO"
            told = (container.duration or 0) / 1e6
            times = Times(self.name, float(stream.average_rate or 0), self._reading.notes)
            try:
                for frame in decoded(container, stream, self.name, self._reading.notes):
                    time, ends = times.of(frame)
                    yield Shown(time, ends, lambda frame=frame: picture(frame, stream, self.name, self._reading))
            except errors() as error:
                self._reading.notes.add(
                    "ended early", f"{self.name} cannot be read beyond {ends:.2f} s: {reason(error)}"
                )
                return
        if ends and told - ends > max(1.0, 0.02 * told):
            self._reading.notes.add(
                "ended early", f"{self.name} ended at {ends:.2f} s, but its header says that it lasts for {told:.2f} s"
            )


class Folder:
    """The pictures of a folder in natural order (2.png before 10.png), 1 / fps seconds apart: all are looked at."""

    live = False

    def __init__(self, name: str, reading: Reading):
        """Raises ValueError for a folder without pictures."""
        self.name, self._reading = name, reading
        suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
        files = [file for file in Path(name).iterdir() if file.is_file() and not file.name.startswith(".")]
        self.files = sorted((file for file in files if file.suffix.lower() in suffixes), key=natural)
        if not self.files:
            raise ValueError(f"--video {cut(name)} is a folder without pictures ({', '.join(FORMATS)})")
        if others := len(files) - len(self.files):
            reading.notes.add("others", f"{name} holds {others} files that are no pictures; they are left out")
        for before, after in missing(self.files):
            reading.notes.add("gap", f"{name}: numbers are missing between {before.name} and {after.name}")

    def __iter__(self) -> Iterator[Shown]:
        fps, max_pixels, config = self._reading.fps, self._reading.max_pixels, self._reading.config
        for n, file in enumerate(self.files):
            yield Shown(n / fps, (n + 1) / fps, lambda file=file: open_image(file, max_pixels, config))


def natural(file: Path) -> list[tuple[int, str]]:
    """A key by which numbers in names count as numbers."""
    parts = NUMBER.split(file.name)
    return [(int(part), part) if n % 2 else (0, part.lower()) for n, part in enumerate(parts)]


def missing(files: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Neighbours in natural order whose names differ in one number, by more than 1."""
    for before, after in zip(files, files[1:], strict=False):
        one, other = NUMBER.split(before.name), NUMBER.split(after.name)
        differing = [n for n, (x, y) in enumerate(zip(one, other, strict=False)) if x != y]
        if len(one) == len(other) and len(differing) == 1 and differing[0] % 2:
            n = differing[0]
            if int(other[n]) > int(one[n]) + 1:
                yield before, after
