"""The memory's manager: which segments make up an episode, decided one by one as they come (MM-Mem, section 3.2).

It is a pure transition, so that several trajectories of one video can be played side by side, and equal states be known
as such.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.segments import evenly

Action = Literal["ADD_NEW", "MERGE", "DISCARD"]
"""The segment begins an episode, belongs to the open one, or is left out."""

ACTIONS: tuple[Action, ...] = ("ADD_NEW", "MERGE", "DISCARD")


@dataclasses.dataclass(frozen=True)
class ManageConfig:
    """What the manager sees."""

    images: int = 64
    """Frames that a decision is shown, at most."""
    reserved: int = 16
    """Of these, for the new segment, whatever the episode has; 0: frames of both are thinned out together, as in the
    release."""

    def __post_init__(self):
        if not 0 <= self.reserved < self.images:
            raise ValueError(f"reserved must be below images={self.images}, got {self.reserved}")


@dataclasses.dataclass(frozen=True)
class Manager:
    """The state between two segments: the open episode, and how many were closed before it."""

    members: tuple[Segment, ...] = ()
    """The segments of the open episode."""
    closed: int = 0

    def asks(self, segment: Segment) -> bool:
        """Whether there is something to decide: without an open episode a segment begins one, and one without frames is
        not seen at all."""
        return bool(self.members and segment.frames)

    def step(self, segment: Segment, action: Action = "ADD_NEW") -> tuple["Manager", Episode | None]:
        """The state behind a segment, and the episode that it closes."""
        if not segment.frames:
            return self, None
        if not self.members:
            return Manager((segment,), self.closed), None
        if action == "DISCARD":
            return self, None
        if action == "MERGE":
            return Manager((*self.members, segment), self.closed), None
        return Manager((segment,), self.closed + 1), self.episode

    @property
    def episode(self) -> Episode | None:
        """The open episode, as it would be closed now."""
        if not self.members:
            return None
        end = max(segment.end for segment in self.members)
        return Episode(self.closed, self.members[0].start, end, tuple(segment.number for segment in self.members))

    def key(self, segment: Segment) -> tuple[int, ...]:
        """What a decision depends on, within a video: equal keys, equal decisions."""
        return (*(member.number for member in self.members), segment.number)


class View(NamedTuple):
    """The frames that a decision is shown."""

    episode: tuple[Frame, ...]
    segment: tuple[Frame, ...]


def view(state: Manager, segment: Segment, config: ManageConfig = ManageConfig()) -> View:
    """Frames of the open episode, and of the segment, evenly from all that there are."""
    before = [frame for member in state.members for frame in member.frames]
    both = [*before, *segment.frames]
    if len(both) <= config.images:
        return View(tuple(before), segment.frames)
    if not config.reserved:
        chosen = evenly(len(both), config.images).tolist()
        place = sum(n < len(before) for n in chosen)
        frames = tuple(both[n] for n in chosen)
        return View(frames[:place], frames[place:])
    new = min(len(segment.frames), max(config.reserved, config.images - len(before)))
    return View(thinned(before, config.images - new), thinned(segment.frames, new))


def thinned(frames: Sequence[Frame], most: int) -> tuple[Frame, ...]:
    """At most so many frames, evenly from all that there are."""
    return tuple(frames[n] for n in evenly(len(frames), most).tolist())
