"""What a memory of a video is made of, layer by layer (MM-Mem, section 3.1), and how each node is written down."""

import dataclasses
import json
import math
import typing
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

VERSION = 1
"""Of how nodes are written, and of the files that hold them."""


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


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What an episode is about, as the model told it: what the symbolic layer is made from."""

    number: int
    """That of the episode, with its times."""
    start: float
    end: float
    said: dict[str, Any]
    frames: tuple[Frame, ...] = ()
    """From which it was told."""


@dataclasses.dataclass(frozen=True)
class Grounding:
    """A node of the symbolic layer: a concept, with the episodes that it is grounded in."""

    number: int
    kind: str
    name: str
    glosses: tuple[str, ...]
    """All that was said of it, each once."""
    episodes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cue:
    """A line of subtitles."""

    number: int
    start: float
    end: float
    text: str


Node = Segment | Episode | Extracted | Grounding | Cue
T = TypeVar("T", bound=Node)


def to_json(node: Node) -> str:
    """A node in one line of ASCII. Raises ValueError for a time that is not finite."""
    return json.dumps(vars(node), allow_nan=False)


def from_json(kind: type[T], text: str | bytes) -> T:
    """The node that `to_json` wrote. Raises ValueError, naming the keys, for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a node must be JSON, but this is not: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"a node must be a JSON object, got a {type(content).__name__}")
    return from_fields(kind, content)


def from_fields(kind: type[T], content: dict[str, Any]) -> T:
    """A node from its fields as JSON has them. Raises ValueError, naming the keys, for others than it has."""
    types, what = typing.get_type_hints(kind), f"a node of kind {kind.__name__.lower()}"
    if wrong := sorted(content.keys() - types.keys()):
        raise ValueError(f"{what} has the keys {', '.join(types)}; got {', '.join(wrong)}, too")
    if missing := [key for key in types if key not in content]:
        raise ValueError(f"{what} has the keys {', '.join(types)}; there is no {', '.join(missing)}")
    fields = {}
    for key, wanted in types.items():
        try:
            fields[key] = _READ[wanted](content[key])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what} holds a wrong {key}: {error}") from error
    return kind(**fields)


def _a(wanted: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise TypeError(f"it must be of {wanted.__name__}, got {value!r:.60}")
        return value

    return read


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"it must be a number, got {value!r:.60}")
    return float(value)


def _frame(value: Any) -> Frame:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TypeError(f"a frame is a name and a time, got {value!r:.60}")
    return Frame(_a(str)(value[0]), _time(value[1]))


def _each(read: Callable[[Any], Any]) -> Callable[[Any], tuple]:
    return lambda value: tuple(map(read, _a(list)(value)))


_READ: dict[Any, Callable[[Any], Any]] = {
    int: _a(int),
    float: _time,
    str: _a(str),
    dict[str, Any]: _a(dict),
    tuple[int, ...]: _each(_a(int)),
    tuple[str, ...]: _each(_a(str)),
    tuple[Frame, ...]: _each(_frame),
}
