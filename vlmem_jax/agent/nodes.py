"""What a memory of a video is made of, layer by layer (MM-Mem, section 3.1)."""

import dataclasses
from typing import NamedTuple


class Frame(NamedTuple):
    """A frame that is kept."""

    name: str
    time: float
    """In seconds."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """A node of the sensory layer: some seconds of the video, as they were seen."""

    number: int
    start: float
    end: float
    """In seconds, as all times."""
    caption: str = ""
    frames: tuple[Frame, ...] = ()


@dataclasses.dataclass(frozen=True)
class Episode:
    """A node of the episodic layer: a run of segments, but for those that were discarded between them."""

    number: int
    start: float
    end: float
    segments: tuple[int, ...]
    """Their numbers."""
    caption: str = ""
    frames: tuple[Frame, ...] = ()
