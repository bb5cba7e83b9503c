"""Rooms with posters of handwritten digits, and exactly what a camera in them sees: pictures, points and poses.

Metres; x along the width of a room, y down from its ceiling, z along its depth. Cameras stand upright at eye level.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from vlmem_jax.demo.mosaics import CELL, Digits
from vlmem_jax.geometry.scene import Scene

SIDE = 32
"""Of a picture, pixels."""
HEIGHT, EYE = 2.6, 1.3
"""Of a room, and of a camera in it below the ceiling."""
POSTER, PAPER = 0.6, 0.78
"""Half the side of a poster, and the part of it inside its coloured frame."""
EDGE, GAP = 0.8, 1.5
"""Of the middle of a poster from the end of its wall, and from that of another, at least."""
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.05),
    "purple": (0.60, 0.10, 0.80),
    "cyan": (0.05, 0.85, 0.90),
    "orange": (1.00, 0.50, 0.05),
    "pink": (1.00, 0.55, 0.80),
}
"""Of the frames of posters, red, green and blue from 0 to 1; those of a room all differ."""
NAMES = tuple(COLOURS)
FEWEST, MOST = 3, 6
"""Posters of a room."""
FLOOR_AND_CEILING = ((0.36, 0.27, 0.2), (0.85, 0.85, 0.85))
_AXIS = (2, 0, 2, 0)
"""The axis that each wall stands across: those at the far z, far x, near z and near x."""
_FAR = (True, True, False, False)
_RIGHT = (1, -1, -1, 1)
"""Whether what is further right on a wall, seen from inside, has the larger x or z."""
_SLOPE = math.tan(math.radians(32))
"""Of the outermost rays: cameras see 64 degrees."""


class Poster(NamedTuple):
    """One poster."""

    wall: int
    along: float
    """x or z of its middle."""
    height: float
    """y of its middle."""
    colour: int
    """Of `NAMES`."""
    digit: int
    ink_SS: Float[np.ndarray, "8 8"]
    """The digit on it, 0 to 1."""


@dataclasses.dataclass(frozen=True)
class Room:
    """A room without furniture."""

    width: float
    depth: float
    posters: tuple[Poster, ...]
    paint_63: Float[np.ndarray, "6 3"]
    """Colours of the walls, the floor and the ceiling."""

    @property
    def size_3(self) -> Float[np.ndarray, "3"]:
        return np.array([self.width, HEIGHT, self.depth], np.float32)

    def middle(self, poster: Poster) -> Float[np.ndarray, "3"]:
        """Where a poster hangs."""
        across = self.size_3[_AXIS[poster.wall]] if _FAR[poster.wall] else 0.0
        place = (poster.along, across) if _AXIS[poster.wall] == 2 else (across, poster.along)
        return np.array([place[0], poster.height, place[1]])

    def normal(self, poster: Poster) -> tuple[float, float]:
        """x and z of the direction into the room from where a poster hangs."""
        inward = -1.0 if _FAR[poster.wall] else 1.0
        return (0.0, inward) if _AXIS[poster.wall] == 2 else (inward, 0.0)


class Path(NamedTuple):
    """A camera's way through a room, T frames."""

    places_T2: Float[np.ndarray, "T 2"]
    """x and z."""
    yaws_T: Float[np.ndarray, "T"]
    """Radians to the right of where z grows."""


class Seen(NamedTuple):
    """What a camera saw of a room in T frames of S x S pixels."""

    pixels_TSSc: UInt8[np.ndarray, "T S S 3"]
    points_TSS3: Float[np.ndarray, "T S S 3"]
    """The point that each pixel shows, as its camera sees it: x right, y down, z forward."""
    normals_TSS3: Float[np.ndarray, "T S S 3"]
    """Of the surface there, as its camera sees it."""
    poses_T44: Float[np.ndarray, "T 4 4"]
    """Camera to room."""
    posters_TSS: Int[np.ndarray, "T S S"]
    """Which poster each pixel shows; -1: none."""


def draw_room(rng: np.random.Generator, pool: Digits) -> Room:
    """A room with FEWEST to MOST posters, no two of them of one colour or near each other."""
    width, depth = rng.uniform(4, 6, 2)
    colours = rng.permutation(len(NAMES))[: int(rng.integers(FEWEST, MOST + 1))].tolist()
    hung: list[tuple[int, float]] = []
    while len(hung) < len(colours):
        hung = []  # places drawn before may leave no room for others
        for wall in rng.integers(4, size=len(colours)).tolist():
            along = rng.uniform(EDGE, (width if _AXIS[wall] == 2 else depth) - EDGE)
            if all(other != wall or abs(there - along) > GAP for other, there in hung):
                hung.append((wall, along))
    posters = []
    for colour, (wall, along) in zip(colours, hung, strict=True):
        chosen = int(rng.integers(len(pool.labels_N)))
        ink_SS = pool.images_NSS[chosen].astype(np.float32) / 255
        posters.append(Poster(wall, along, EYE + rng.uniform(-0.06, 0.06), colour, int(pool.labels_N[chosen]), ink_SS))
    walls_43 = rng.uniform(0.35, 0.65, (4, 1)) + rng.uniform(-0.08, 0.08, (4, 3))
    return Room(width, depth, tuple(posters), np.concatenate([walls_43, FLOOR_AND_CEILING]).astype(np.float32))


def render(room: Room, path: Path) -> Seen:
    """Casts a ray through the middle of every pixel of every frame."""
    poses_T44 = poses(path)
    turns_T133, origin_T113 = poses_T44[:, None, :3, :3], poses_T44[:, None, None, :3, 3]
    along_S = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1).astype(np.float32)
    rays_SS3 = np.stack(np.broadcast_arrays(along_S * _SLOPE, along_S[:, None] * _SLOPE, 1.0), axis=-1)
    rays_TSS3 = rays_SS3 @ turns_T133.swapaxes(2, 3)
    with np.errstate(divide="ignore"):
        far_TSS3 = (np.where(rays_TSS3 > 0, room.size_3, np.float32(0)) - origin_T113) / rays_TSS3
    far_TSS3 = np.where(rays_TSS3 == 0, np.inf, far_TSS3)
    axis_TSS = far_TSS3.argmin(-1)
    depth_TSS1 = np.take_along_axis(far_TSS3, axis_TSS[..., None], -1)
    forward_TSS = np.take_along_axis(rays_TSS3, axis_TSS[..., None], -1)[..., 0] > 0
    at_TSS3 = origin_T113 + depth_TSS1 * rays_TSS3
    normals_TSS3 = np.where(np.arange(3) == axis_TSS[..., None], -np.sign(rays_TSS3), np.float32(0))
    colour_TSSc, posters_TSS = _painted(room, at_TSS3, axis_TSS, forward_TSS)
    facing_TSS1 = np.abs((normals_TSS3 * rays_TSS3).sum(-1, keepdims=True))
    facing_TSS1 /= np.linalg.norm(rays_SS3, axis=-1, keepdims=True)
    lit_TSSc = colour_TSSc * (0.7 + 0.3 * facing_TSS1)
    return Seen(
        np.rint(np.clip(lit_TSSc, 0, 1) * 255).astype(np.uint8),
        depth_TSS1 * rays_SS3,
        normals_TSS3 @ turns_T133,
        poses_T44,
        posters_TSS,
    )


def poses(path: Path) -> Float[np.ndarray, "T 4 4"]:
    """Camera to room."""
    sin_T, cos_T = np.sin(path.yaws_T), np.cos(path.yaws_T)
    poses_T44 = np.tile(np.eye(4, dtype=np.float32), (len(path.yaws_T), 1, 1))
    poses_T44[:, 0, 0], poses_T44[:, 0, 2] = cos_T, sin_T
    poses_T44[:, 2, 0], poses_T44[:, 2, 2] = -sin_T, cos_T
    poses_T44[:, :3, 3] = np.insert(path.places_T2, 1, EYE, axis=1)
    return poses_T44


def _painted(
    room: Room,
    at_TSS3: Float[np.ndarray, "T S S 3"],
    axis_TSS: Int[np.ndarray, "T S S"],
    forward_TSS: np.ndarray,
) -> tuple[Float[np.ndarray, "T S S 3"], Int[np.ndarray, "T S S"]]:
    """The colour of points on surfaces, of which the axis and the side are given, and the poster there, -1: none."""
    wall_TSS = np.where(axis_TSS == 2, np.where(forward_TSS, 0, 2), np.where(forward_TSS, 1, 3))
    surface_TSS = np.where(axis_TSS == 1, np.where(forward_TSS, 4, 5), wall_TSS)
    colour_TSSc = room.paint_63[surface_TSS]
    posters_TSS = np.full(surface_TSS.shape, -1)
    for number, poster in enumerate(room.posters):
        on_wall = np.nonzero(surface_TSS == poster.wall)
        points_N3 = at_TSS3[on_wall]
        right_N = (points_N3[:, 2 - _AXIS[poster.wall]] - poster.along) * _RIGHT[poster.wall] / POSTER
        down_N = (points_N3[:, 1] - poster.height) / POSTER
        on_it = (np.abs(right_N) < 1) & (np.abs(down_N) < 1)
        here, right_N, down_N = tuple(index[on_it] for index in on_wall), right_N[on_it], down_N[on_it]
        frame_c = np.array(COLOURS[NAMES[poster.colour]])
        paper_Nc = (0.4 * frame_c + 0.6) * (1 - 0.95 * _ink(poster.ink_SS, right_N / PAPER, down_N / PAPER)[:, None])
        inside_N1 = (np.maximum(np.abs(right_N), np.abs(down_N)) < PAPER)[:, None]
        colour_TSSc[here] = np.where(inside_N1, paper_Nc, frame_c)
        posters_TSS[here] = number
    return colour_TSSc, posters_TSS


def _ink(
    ink_SS: Float[np.ndarray, "8 8"], right_N: Float[np.ndarray, "N"], down_N: Float[np.ndarray, "N"]
) -> Float[np.ndarray, "N"]:
    """Ink at places of a digit, each from -1 to 1, between its pixels in proportion."""
    padded = np.pad(ink_SS, 1)
    column_N, row_N = (np.clip((x + 1) * CELL / 2 + 0.5, 0, CELL + 0.999) for x in (right_N, down_N))
    c_N, r_N = column_N.astype(int), row_N.astype(int)
    x_N, y_N = column_N - c_N, row_N - r_N
    upper_N = padded[r_N, c_N] * (1 - x_N) + padded[r_N, c_N + 1] * x_N
    lower_N = padded[r_N + 1, c_N] * (1 - x_N) + padded[r_N + 1, c_N + 1] * x_N
    return upper_N * (1 - y_N) + lower_N * y_N


class Oracle:
    """What stands for a model of geometry: of each patch its mean point, its normal and its ray, and of a view its
    camera, spread over as many numbers as a memory reads."""

    def __init__(self, tokens: int, views: int, grid: int):
        rng = np.random.default_rng(0)  # the same in every run
        self.grid = grid
        self._tokens_FG, self._views_FV = (
            rng.normal(size=(size, width)) / math.sqrt(size) for size, width in ((9, tokens), (12, views))
        )

    def scene(self, seen: Seen) -> Scene:
        """The world is that of the first camera."""
        poses_T44 = np.linalg.inv(seen.poses_T44[0]) @ seen.poses_T44
        rays_TSS3 = seen.points_TSS3 / seen.points_TSS3[..., 2:]
        local_TNF = self._means(np.concatenate([seen.points_TSS3 / 3, seen.normals_TSS3, rays_TSS3], axis=-1))
        camera_TF = np.concatenate([poses_T44[:, :3, :3].reshape(-1, 9), poses_T44[:, :3, 3] / 3], axis=-1)
        views_TNV = np.repeat((camera_TF @ self._views_FV)[:, None], self.grid**2, axis=1)
        confidence_TSS = np.ones(seen.points_TSS3.shape[:-1], np.float32)
        return Scene(seen.points_TSS3, confidence_TSS, poses_T44, local_TNF @ self._tokens_FG, views_TNV)

    def _means(self, x_TSSF: Float[np.ndarray, "T S S F"]) -> Float[np.ndarray, "T N F"]:
        T, S, _, F = x_TSSF.shape
        blocks = x_TSSF.reshape(T, self.grid, S // self.grid, self.grid, S // self.grid, F)
        return blocks.mean((2, 4)).reshape(T, self.grid**2, F)
