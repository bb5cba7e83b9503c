"""Video files, cameras and folders of pictures as what a memory is built from."""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlmem_jax.agent.calls import Work
from vlmem_jax.agent.nodes import Frame
from vlmem_jax.agent.segments import IngestConfig
from vlmem_jax.agent.stream import Keep, StreamBuilder
from vlmem_jax.stream.frames import Source
from vlmem_jax.stream.notes import Notes


def watch(source: Source, builder: StreamBuilder, notes: Notes) -> Work[float]:
    """Builds the memory of all that a source shows, decoded once, and returns when it ended, in seconds.

    A frame that is damaged, or comes no later than the one before, is noted with its time and left out; so of a file
    that breaks off, what comes before is kept. Raises ValueError if nothing can be decoded.
    """
    last, end, count = -np.inf, 0.0, 0
    for shown in source:
        if shown.time <= last:
            notes.add("time", f"{source.name}: a frame at {shown.time:.2f} s comes no later than the one before; it is "
                      "left out")  # fmt: skip
            continue
        last, end = shown.time, shown.ends
        try:
            picture = shown.picture()
        except ValueError as error:
            notes.add("failed", f"{source.name}: the frame at {shown.time:.2f} s is left out: {error}")
            continue
        count += 1
        yield from builder.push(np.asarray(picture), shown.time)
    if not count:
        raise ValueError(f"{source.name} holds no frame that can be decoded")
    yield from builder.flush(end)
    return end


def keeper(write: Callable[[bytes], str], config: IngestConfig) -> Keep:
    """Keeps frames as JPEG files; `write` takes each, and gives its name."""
    return lambda frame_HWc, time: Frame(write(jpeg(frame_HWc, config)), time)


def jpeg(frame_HWc: UInt8[np.ndarray, "H W 3"], config: IngestConfig) -> bytes:
    """A frame, in RGB, as it is kept."""
    picture = Image.fromarray(frame_HWc)
    if config.side:  # never enlarges; this filter is as sharp as bicubic here, and takes half the time
        picture.thumbnail((config.side, config.side), Image.Resampling.HAMMING)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=config.quality)
    return buffer.getvalue()
