"""Frames of an open container, of which one that is damaged is no more than one that is left out."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from vlmem_jax.processing.images import check_pixels
from vlmem_jax.processing.video import picture_of
from vlmem_jax.stream.frames import Reading
from vlmem_jax.stream.notes import Notes


def decoded(container: Any, stream: Any, name: str, notes: Notes) -> Iterator[Any]:
    """All frames of PyAV that can be decoded; others are noted. Raises what reading the container raises."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except errors() as error:
            notes.add("failed", f"{name}: a frame cannot be decoded ({reason(error)}); it is left out")
            continue
        yield from frames


def errors() -> tuple[type[Exception], ...]:
    """What PyAV raises where something cannot be opened, read or decoded. Raises ValueError where there is no PyAV."""
    try:
        from av.error import FFmpegError
    except ImportError as error:
        raise ValueError("reading video needs PyAV; install vlmem_jax[video]") from error
    return FFmpegError, OSError


def reason(error: Exception) -> str:
    """What an error says, without the name that it repeats."""
    return getattr(error, "strerror", None) or str(error)


def picture(frame: Any, stream: Any, name: str, reading: Reading) -> Image.Image:
    """A decoded frame as it is shown. Raises ValueError for one that is damaged or too large."""
    if frame.is_corrupt:
        raise ValueError(f"{name}: a frame is damaged")
    check_pixels(name, (frame.width, frame.height), reading.max_pixels)
    return picture_of(frame, stream, reading.config)
