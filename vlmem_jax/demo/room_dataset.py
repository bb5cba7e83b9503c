"""The dataset of VLM^2's demo on disk: videos of rooms, what is known of their space, and conversations about them.

FOLDER/videos/NAME/*.mov    lossless
FOLDER/read.jsonl      single frames, to learn to read: which posters they show
FOLDER/glimpses.jsonl  one to four frames, to learn which poster is which
FOLDER/told.jsonl      short videos, as many frames as are shown at once, which show every poster: what there is to tell
FOLDER/clips.jsonl     the same videos, and questions of every type
FOLDER/long.jsonl      longer ones, of which a memory keeps so many frames
FOLDER/asked/MOTION_FRAMES.jsonl    a video a line, and questions of every type about it: the accuracy
FOLDER/NAME.array_record    the geometry of the videos of NAME.jsonl, from an oracle: it is exact
FOLDER/tokenizer/
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vlmem_jax.data.geometry import ClipKey, mark_of, write_clips
from vlmem_jax.data.records import shard_name
from vlmem_jax.demo.cameras import MOTIONS, Motion, draw_path
from vlmem_jax.demo.dataset import write_lines
from vlmem_jax.demo.mosaics import Digits, load_digits
from vlmem_jax.demo.questions import Question
from vlmem_jax.demo.room_questions import (
    IGNORED,
    KEPT,
    READABLE,
    SEEN,
    TYPES,
    Facts,
    Kind,
    conversation,
    fill,
    questions,
)
from vlmem_jax.demo.rooms import NAMES, SIDE, Oracle, Room, Seen, draw_room, render
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.geometry.coordinates import clip_geometry
from vlmem_jax.types import Geometry, GeometryShape

SHOWN = 8
"""Frames that stand in the sequence at once."""
SHOWN_TOKENS = 5 * SHOWN + 6
"""Of them, and of what opens a conversation."""
LONG = 24
"""Frames of the longest videos that are trained on."""
NAMING: tuple[Kind, ...] = ("posters",)
READING: tuple[Kind, ...] = ("posters", "posters", "posters", "digit", "digit", "colours", "seen")
TELLING: tuple[Kind, ...] = ("posters", "directions", "distances", "colours", "seen")
ASKING: tuple[Kind, ...] = (*TYPES, *TYPES, "seen", "far")
"""Kinds of questions, as often as they stand here. What is told of all posters would answer what is asked behind it,
without a look at the video."""


About = Callable[[Room, Seen, Facts], dict[str, dict[str, Any]]]
"""Keys of a line about a video, by the file that the line stands in."""


@dataclasses.dataclass(frozen=True)
class RoomsConfig:
    """Sizes of the dataset."""

    read: int = 6000
    glimpses: int = 5000
    clips: int = 2400
    long: int = 500
    asked: int = 60
    """Videos of each motion and length that held-out questions are asked about."""
    lengths: Mapping[Motion, tuple[int, ...]] = dataclasses.field(
        default_factory=lambda: {"dwell": (24, 96, 384), "scan": (96,)}
    )
    reading_tokens: int = 20
    telling_tokens: int = 128
    tokens: int = 216
    """Longest conversations: for each frame to read, what there is to tell of a video, and questions about it."""
    seed: int = 0


def write_rooms(folder: pathlib.Path, config: RoomsConfig, reads: GeometryShape, grid: int) -> None:
    """Writes everything into `folder`. The same config gives the same videos and lines. `reads`: how much a memory
    reads of the space that a frame shows, patches of `grid` x `grid`."""
    train, heldout = load_digits()
    rng = np.random.default_rng(config.seed)
    write_tokenizer(folder / "tokenizer", KEPT, IGNORED)
    for name, count, most, kinds in (("read", config.read, 1, NAMING), ("glimpses", config.glimpses, 4, READING)):
        write_lines(folder / f"{name}.jsonl", _glimpses(rng, folder, name, train, count, most, kinds, config))
    oracle = Oracle(reads.tokens, reads.views, grid)

    def write(name: str, pool: Digits, count: int, length: int, motions: Sequence[Motion], about: About) -> None:
        lines: dict[str, list[dict[str, Any]]] = {}

        def clips() -> Iterator[tuple[ClipKey, str, Geometry]]:
            for number in range(count):
                room, seen = visit(rng, pool, motions[number % len(motions)], length)
                path = f"videos/{name}/{number:05}.mov"
                write_video(folder / path, seen.pixels_TSSc)
                facts = Facts.of(room, seen)
                for file, more in about(room, seen, facts).items():
                    lines.setdefault(file, []).append({"video": path} | more)
                key = ClipKey(path, tuple(range(length)), (length, SIDE, SIDE))
                yield key, mark_of(folder / path), clip_geometry(oracle.scene(seen), grid, "first")

        (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_clips(folder / shard_name(name, 0, 1), {"model": "oracle"}, "bf16", clips())
        for file, found in lines.items():
            write_lines(folder / f"{file}.jsonl", found)

    def talk(facts: Facts, kinds: Sequence[Kind], tokens: int) -> dict[str, Any]:
        return {"conversations": conversation(fill(rng, facts, kinds, tokens - SHOWN_TOKENS))}

    def short(room: Room, seen: Seen, facts: Facts) -> dict[str, dict[str, Any]]:
        return {"told": talk(facts, TELLING, config.telling_tokens), "clips": talk(facts, ASKING, config.tokens)}

    write("clips", train, config.clips, SHOWN, MOTIONS, short)
    write("long", train, config.long, LONG, MOTIONS, lambda *what: {"long": talk(what[2], ASKING, config.tokens)})
    for motion, lengths in config.lengths.items():
        for length in lengths:
            name = asked_name(motion, length)
            write(name, heldout, config.asked, length, (motion,), lambda *what, name=name: {name: _asked(rng, *what)})


def asked_name(motion: Motion, length: int) -> str:
    """The file of questions about such videos, without its end."""
    return f"asked/{motion}_{length}"


def visit(rng: np.random.Generator, pool: Digits, motion: Motion, length: int) -> tuple[Room, Seen]:
    """A room, and a video of it."""
    room = draw_room(rng, pool)
    return room, render(room, draw_path(rng, room, motion, length))


def best(room: Room, seen: Seen) -> dict[str, int]:
    """The frame that shows most of each poster that is seen, by its colour."""
    pixels_NT = np.stack([(seen.posters_TSS == n).sum((1, 2)) for n in range(len(room.posters))])
    frames = {NAMES[one.colour]: int(x_T.argmax()) for one, x_T in zip(room.posters, pixels_NT, strict=True)}
    return {name: time for (name, time), x_T in zip(frames.items(), pixels_NT, strict=True) if x_T.max() >= SEEN}


def write_video(path: pathlib.Path, pixels_TSSc: UInt8[np.ndarray, "T S S 3"]) -> None:
    """A lossless video of one frame a second."""
    import av  # an extra

    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=1)
        stream.height, stream.width, stream.pix_fmt = *pixels_TSSc.shape[1:3], "rgb24"
        for pixels_SSc in pixels_TSSc:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels_SSc, format="rgb24")))
        container.mux(stream.encode())


def _glimpses(
    rng: np.random.Generator,
    folder: pathlib.Path,
    name: str,
    pool: Digits,
    count: int,
    most: int,
    kinds: Sequence[Kind],
    config: RoomsConfig,
) -> Iterator[dict[str, Any]]:
    """Lines about one to `most` frames of a room, each of which shows a poster that can be read."""
    (folder / "videos" / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        asked: list[Question] = []
        while not asked:
            room, seen = visit(rng, pool, "dwell", SHOWN)
            pixels_NT = np.stack([(seen.posters_TSS == n).sum((1, 2)) for n in range(len(room.posters))])
            times = rng.permutation(np.flatnonzero(pixels_NT.max(0) >= READABLE))[: int(rng.integers(1, most + 1))]
            if len(times):
                some = Seen(*(x[np.sort(times)] for x in seen))
                asked = fill(rng, Facts.of(room, some), kinds, config.reading_tokens * len(times))
        path = f"videos/{name}/{number:05}.mov"
        write_video(folder / path, some.pixels_TSSc)
        yield {"video": path, "conversations": conversation(asked)}


def _asked(rng: np.random.Generator, room: Room, seen: Seen, facts: Facts) -> dict[str, Any]:
    """A question of each type, and its answer, where there is one; and which frames show most."""
    found = {}
    for kind in TYPES:
        if every := questions(facts, kind):
            one = every[int(rng.integers(len(every)))]
            found[kind] = [one.text, one.answer]
    return {"asked": found, "best": best(room, seen)}
