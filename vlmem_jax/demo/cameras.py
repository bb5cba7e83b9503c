"""How cameras move through rooms: one that stays and glances at posters now and then, and one that turns evenly."""

from typing import Literal

import numpy as np
from jaxtyping import Int

from vlmem_jax.demo.rooms import Path, Room

Motion = Literal["dwell", "scan"]
MOTIONS: tuple[Motion, ...] = ("dwell", "scan")
LONGEST_GLANCE = 2
"""Frames."""


def draw_path(rng: np.random.Generator, room: Room, motion: Motion, frames: int) -> Path:
    """`frames` frames of a camera that moves like this."""
    return (dwell if motion == "dwell" else scan)(rng, room, frames)


def dwell(rng: np.random.Generator, room: Room, frames: int) -> Path:
    """Stays at one place and looks one way, but for a glance at each poster from near, at some time or other."""
    home_2, home_yaw = rng.uniform(0.35, 0.65, 2) * [room.width, room.depth], rng.uniform(-np.pi, np.pi)
    places_T2 = home_2 + rng.normal(0, 0.03, (frames, 2))
    yaws_T = home_yaw + rng.normal(0, 0.03, frames)
    for time, number in enumerate(glances(rng, len(room.posters), frames).tolist()):
        if number >= 0:
            poster = room.posters[number]
            x, z = room.normal(poster)
            near_2 = room.middle(poster)[[0, 2]] + rng.uniform(1.5, 1.7) * np.array([x, z])
            places_T2[time] = near_2 + rng.normal(0, 0.04, 2)
            yaws_T[time] = np.arctan2(-x, -z) + rng.normal(0, 0.03)
    return Path(places_T2, yaws_T)


def glances(rng: np.random.Generator, posters: int, frames: int) -> Int[np.ndarray, "T"]:
    """The poster that each frame glances at, -1: none. The first frame never glances."""
    longest = LONGEST_GLANCE if frames > LONGEST_GLANCE * posters + 1 else 1
    lengths = rng.integers(1, longest + 1, posters)
    # of the frames that glance at nothing, those behind which a glance begins
    behind = np.sort(rng.integers(0, frames - lengths.sum(), posters)) + 1
    starts = behind + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    shown_T = np.full(frames, -1)
    for poster, start, length in zip(rng.permutation(posters).tolist(), starts, lengths, strict=True):
        shown_T[start : start + length] = poster
    return shown_T


def scan(rng: np.random.Generator, room: Room, frames: int) -> Path:
    """Turns round once, evenly, while it walks a little."""
    size_2 = np.array([room.width, room.depth])
    begin_2, end_2 = rng.uniform(0.4, 0.6, (2, 2)) * size_2
    part_T = np.arange(frames) / frames
    places_T2 = begin_2 + part_T[:, None] * (end_2 - begin_2)
    return Path(places_T2, rng.uniform(-np.pi, np.pi) + rng.choice([-1, 1]) * 2 * np.pi * part_T)
