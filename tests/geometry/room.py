"""A camera that walks about a room, and what a model of geometry makes of its frames."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from vlmem_jax.geometry.scene import Scene

SIDE, GRID = 14, 7
WALLS = np.array([[-4.0, -1.5, -4.5], [4.0, 1.5, 4.5]])
"""Opposite corners of the room, metres."""


def turn(v_3):
    """The rotation about a vector by its length."""
    x, y, z = v_3 / max(np.linalg.norm(v_3), 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.linalg.norm(v_3)
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def picture(number):
    """A frame that shows its number."""
    return np.frombuffer(int(number).to_bytes(12, "little"), np.uint8).reshape(2, 2, 3)


def numbers(pictures_NHWc):
    return [int.from_bytes(shown.tobytes(), "little") for shown in pictures_NHWc]


@functools.cache
def camera(number):
    """(rotation, place) in the room: it turns all the time, and comes back to where it was."""
    return turn(np.array([0, 0.03 * number, 0])), np.array([2 * np.cos(0.02 * number), 0, 2 * np.sin(0.013 * number)])


@functools.cache
def view(number):
    """The points on the walls that a frame's pixels show, as its camera sees them."""
    rotation, place = camera(number)
    x, y = np.meshgrid(np.linspace(-0.6, 0.6, SIDE), np.linspace(-0.6, 0.6, SIDE))
    rays = np.stack([x, y, np.ones_like(x)], -1)
    ahead = rays @ rotation.T
    reaches = (np.where(ahead > 0, WALLS[1], WALLS[0]) - place) / np.where(ahead == 0, 1e-12, ahead)
    return rays * np.abs(reaches).min(-1, keepdims=True)


def pose(number):
    return np.block([[camera(number)[0], camera(number)[1][:, None]], [np.zeros(3), 1]])


def truth(chosen, first=0):
    """Coordinates [T, N, 3] of frames in a world that begins at frame `first`."""

    def means(number):
        return view(number).reshape(GRID, SIDE // GRID, GRID, SIDE // GRID, 3).mean((1, 3)).reshape(-1, 3)

    rotation, place = camera(first)
    scale = np.linalg.norm(means(first), axis=-1).mean()
    return np.stack([(means(n) @ camera(n)[0].T + camera(n)[1] - place) @ rotation / scale for n in chosen])


@dataclasses.dataclass
class Oracle:
    """The room as a model of geometry sees it: each window in a world of its own, which the window decides."""

    noise: float = 0.0
    """Standard deviation of logarithms of depths and of a window's scale; degrees of a frame's turn are 30 times,
    metres of its place twice that, and windows bend by 11 degrees a frame times that."""
    cuts: tuple[int, ...] = ()
    """Frames at which another video begins: how it lies to the one before is anybody's guess."""
    spoil: Callable = lambda shown, points, confidence, poses: None
    """Changes what is seen in place, so that something else goes wrong."""
    windows: list = dataclasses.field(default_factory=list)
    """Frames that it was shown."""

    def __call__(self, pictures_NHWc):
        shown = numbers(pictures_NHWc)
        self.windows.append(shown)
        rng = np.random.default_rng(shown)
        worlds = [(np.exp(rng.normal()), turn(rng.normal(size=3)), rng.normal(size=3) * 3) for _ in range(9)]
        stretch, bend = np.exp(rng.normal() * self.noise), rng.normal(size=3) * 0.2 * self.noise
        points, poses = [], []
        for slot, number in enumerate(shown):
            scale, rotation, shift = worlds[sum(number >= cut for cut in self.cuts)]
            about, place = camera(number)
            about = turn(rng.normal(size=3) * np.deg2rad(30 * self.noise)) @ turn(bend * slot) @ about
            place = place * stretch + rng.normal(size=3) * 2 * self.noise
            points.append(view(number) * np.exp(rng.normal() * self.noise) * stretch * scale)
            there = (scale * rotation @ place + shift)[:, None]
            poses.append(np.block([[rotation @ about, there], [np.zeros(3), 1]]))
        points, poses = np.array(points, np.float32), np.array(poses, np.float32)
        confidence = np.full(points.shape[:3], 0.9, np.float32)
        self.spoil(shown, points, confidence, poses)
        tokens = np.broadcast_to(np.array(shown, np.float32)[:, None, None], (len(shown), GRID**2, 4))
        return Scene(points, confidence, poses, tokens, tokens[..., :2])
