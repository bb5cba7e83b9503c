"""Inputs of questions about long videos: videos by the names that a question has for them, and frames up to the moment
at which it is asked.

HD-EPIC (arXiv 2502.04144) names several videos in a question; VStream-QA (arXiv 2406.08085) gives frames as files, a
second each or shot by shot, and asks while the video runs.
"""

import re
import string
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

# --- HD-EPIC ----------------------------------------------------------------------------------------------------------


def named(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Ids of videos by the names that a question has for them, "video 2" or "image 1", as they are listed. What is no
    such name, or has no id, is left out."""
    found = {name: of.get("id") for name, of in inputs.items() if _NAME.fullmatch(name) and isinstance(of, Mapping)}
    return {name: video for name, video in found.items() if isinstance(video, str) and video}


_NAME = re.compile(r"(video|image) (\d{1,6})")


def in_order(videos: Mapping[str, str]) -> dict[str, str]:
    """Those of `named`, videos before images, each by number: the tenth behind the second."""
    return dict(sorted(videos.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> tuple[bool, int]:
    kind, number = name.split(" ")
    return kind != "video", int(number)


def option_letter(index: int) -> str:
    """The letter of an option by its number, from 0; empty beyond Z."""
    return string.ascii_uppercase[index] if 0 <= index < len(string.ascii_uppercase) else ""


# --- VStream-QA -------------------------------------------------------------------------------------------------------


def frames_of_seconds(names: Iterable[str], first: float, last: float, fps: float = 1.0) -> list[str]:
    """Files of frames whose names are numbers, from 1, between two times in seconds; both are shown."""
    numbers = {name: int(stem) for name in names if (stem := PurePosixPath(name).stem).isdecimal()}
    found = [name for name, number in numbers.items() if int(first * fps) < number <= int(last * fps) + 1]
    return sorted(found, key=numbers.__getitem__)


class Shot(NamedTuple):
    """Where a frame stands in a film."""

    shot: int
    image: int
    """In the shot."""


def shot_of(name: str) -> Shot | None:
    """By the name of its file, shot_0002_img_1; None for another name."""
    found = re.fullmatch(r"shot_(\d{1,9})_img_(\d{1,9})", PurePosixPath(name).stem)
    return Shot(int(found[1]), int(found[2])) if found else None


def frames_of_shots(names: Iterable[str], first: Shot | None, last: Shot | None) -> list[str]:
    """Files of frames of a film between two, which are shown themselves; None: there is no bound. A question whose time
    is no frame must not be asked with `last=None`: it would see what comes after it."""
    places = {name: place for name in names if (place := shot_of(name))}
    found = [
        name for name, place in places.items() if (first is None or first <= place) and (last is None or place <= last)
    ]
    return sorted(found, key=places.__getitem__)
