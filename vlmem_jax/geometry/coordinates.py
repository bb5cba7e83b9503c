"""The points in space that the patches of frames show (VLM^2 sec. 3.2), of point maps and cameras. Pure numpy."""

from typing import Literal

import numpy as np
from jaxtyping import Float

from vlmem_jax.geometry.scene import Scene
from vlmem_jax.types import Geometry

SMALLEST = 1e-6
"""Added to the size of a scene before it is divided by; and the least weight of a point."""
RIGID = 1e-3
"""By which products of a camera's axes may differ from those of perpendicular ones of length 1."""

Scale = Literal["clip", "first", "none"]


def clip_geometry(scene: Scene, grid: int, scale: Scale = "clip", confidence_weighted: bool = False) -> Geometry:
    """What is known of T frames that a model of geometry saw at once, in numpy arrays [T, N, ...], N = grid x grid.

    `confidence_weighted`: a patch's point is the mean of its pixels' by their confidence. Raises ValueError naming the
    frame whose geometry is of no use, see `fault`.
    """
    scene = Scene(*map(np.asarray, scene))
    for number, frame in enumerate(zip(*scene, strict=True)):
        if (found := fault(*frame)) is not None:
            raise ValueError(f"geometry of frame {number} of {len(scene.poses_N44)}: {found}")
    check_grid(scene, grid)
    weights_THW = scene.confidence_NHW if confidence_weighted else None
    coords_TN3 = coordinates(scene.points_NHW3, scene.poses_N44, grid, scale, weights_THW)
    return Geometry(scene.tokens_NPG, scene.views_NPV, coords_TN3.astype(np.float32))


def fault(
    points_HW3: Float[np.ndarray, "H W 3"],
    confidence_HW: Float[np.ndarray, "H W"],
    pose_44: Float[np.ndarray, "4 4"],
    tokens_PG: Float[np.ndarray, "P G"],
    views_PV: Float[np.ndarray, "P V"],
    least: float = 0.05,
) -> str | None:
    """What makes a frame's geometry of no use, None where nothing does: a number that is none, no point in front of the
    camera, no point of more confidence than `least`, a pose that is not rigid."""
    arrays = dict(points=points_HW3, confidence=confidence_HW, pose=pose_44, tokens=tokens_PG, views=views_PV)
    for name, x in arrays.items():
        if not np.isfinite(np.asarray(x, np.float32)).all():  # of bfloat16 itself, it takes 20 times as long
            return f"{name} must be finite, got NaN or infinity"
    if not (points_HW3[..., 2] > 0).any():
        return "points must lie in front of the camera, got depths of 0 or less alone"
    if not (confidence_HW > least).any():
        return f"a point must have a confidence above {least}, got at most {confidence_HW.max():.3g}"
    axes_33 = np.asarray(pose_44[:3, :3], np.float64)
    off = np.abs(axes_33 @ axes_33.T - np.eye(3)).max()
    if off > RIGID or np.linalg.det(axes_33) < 0 or np.abs(pose_44[3] - np.eye(4)[3]).max() > RIGID:
        return (
            f"poses must be rigid, [rotation shift; 0 0 0 1], got rows that are {off:.3g} off perpendicular ones of "
            f"length 1, a determinant of {np.linalg.det(axes_33):.3g} and the last row {pose_44[3].tolist()}"
        )
    return None


def check_grid(scene: Scene, grid: int) -> None:
    """Raises ValueError where a model of geometry cuts frames into other patches than the tower does."""
    if (patches := scene.tokens_NPG.shape[1]) != grid**2:
        raise ValueError(f"the model of geometry must see {grid} x {grid} patches, as the tower does, got {patches}")


def coordinates(
    points_THW3: Float[np.ndarray, "T H W 3"],
    poses_T44: Float[np.ndarray, "T 4 4"],
    grid: int,
    scale: Scale = "clip",
    weights_THW: Float[np.ndarray, "T H W"] | None = None,
) -> Float[np.ndarray, "T N 3"]:
    """Of N = grid x grid patches of each of T frames, row by row: the mean point, as the first camera sees it.

    `points`: of each pixel, as its own camera sees it; `poses`: camera to world. `scale`: what they are divided by, the
    mean distance in the whole clip, or in the first frame, which a stream has known from its beginning. Raises
    ValueError where frames cannot be cut so, or where that distance is 0.
    """
    coords_TN3 = in_first_camera(patch_means(points_THW3, grid, weights_THW), poses_T44)
    if scale == "none":
        return coords_TN3
    return coords_TN3 / scene_size(coords_TN3 if scale == "clip" else coords_TN3[:1])


def scene_size(coords: Float[np.ndarray, "*any 3"]) -> float:
    """The mean distance of points, by which a scene is brought to unit size. Raises ValueError where it is 0."""
    if (mean := float(np.linalg.norm(coords, axis=-1).mean())) == 0:
        raise ValueError("points must have a mean distance above 0, got 0: all of them lie in the first camera")
    return mean + SMALLEST


def in_first_camera(
    points: Float[np.ndarray, "T *pixels 3"], poses_T44: Float[np.ndarray, "T 4 4"]
) -> Float[np.ndarray, "T *pixels 3"]:
    """The points of each frame in the coordinates of the first one's camera."""
    poses_T44 = poses_T44.astype(np.float64)
    moves_T44 = np.linalg.inv(poses_T44[0]) @ poses_T44
    turned = np.einsum("tij,t...j->t...i", moves_T44[:, :3, :3], points)
    return turned + moves_T44[:, :3, 3].reshape(-1, *(1,) * (points.ndim - 2), 3)


def patch_means(
    points_THW3: Float[np.ndarray, "T H W 3"], grid: int, weights_THW: Float[np.ndarray, "T H W"] | None = None
) -> Float[np.ndarray, "T N 3"]:
    """Means of `grid` x `grid` equal blocks of each frame, weighted by `weights` where they are given; in float64."""

    def block_means(x_THWc: np.ndarray) -> np.ndarray:
        T, H, W, c = x_THWc.shape
        blocks = x_THWc.reshape(T, grid, H // grid, grid, W // grid, c)
        return blocks.mean((2, 4), dtype=np.float64).reshape(T, grid * grid, c)

    _, H, W, _ = points_THW3.shape
    if H % grid or W % grid:
        raise ValueError(f"point maps must have sides that are multiples of {grid} patches, got {W}x{H}")
    if weights_THW is None:
        return block_means(points_THW3)
    weights_THW1 = np.maximum(weights_THW, SMALLEST)[..., None]
    return block_means(points_THW3 * weights_THW1) / block_means(weights_THW1)
