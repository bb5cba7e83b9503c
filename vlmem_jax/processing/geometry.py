"""The points in space that the patches of frames show (VLM^2 sec. 3.2), of point maps and cameras. Pure numpy."""

from typing import Literal

import numpy as np
from jaxtyping import Float

SMALLEST = 1e-6
"""Added to the size of a scene before it is divided by."""


def coordinates(
    points_THW3: Float[np.ndarray, "T H W 3"],
    poses_T44: Float[np.ndarray, "T 4 4"],
    grid: int,
    scale: Literal["clip", "first", "none"] = "clip",
) -> Float[np.ndarray, "T N 3"]:
    """Of N = grid x grid patches of each of T frames, row by row: the mean point, as the first camera sees it.

    `points`: of each pixel, as its own camera sees it; `poses`: camera to world. `scale`: what they are divided by, the
    mean distance in the whole clip, or in the first frame, which a stream has known from its beginning. Raises
    ValueError where frames cannot be cut so.
    """
    coords_TN3 = patch_means(in_first_camera(points_THW3, poses_T44), grid)
    if scale == "none":
        return coords_TN3
    measured = coords_TN3 if scale == "clip" else coords_TN3[:1]
    return coords_TN3 / (np.linalg.norm(measured, axis=-1).mean() + SMALLEST)


def in_first_camera(
    points_THW3: Float[np.ndarray, "T H W 3"], poses_T44: Float[np.ndarray, "T 4 4"]
) -> Float[np.ndarray, "T H W 3"]:
    """The points of each frame in the coordinates of the first one's camera."""
    moves_T44 = np.linalg.inv(poses_T44[0]) @ poses_T44
    turned = np.einsum("tij,thwj->thwi", moves_T44[:, :3, :3], points_THW3)
    return turned + moves_T44[:, None, None, :3, 3]


def patch_means(points_THW3: Float[np.ndarray, "T H W 3"], grid: int) -> Float[np.ndarray, "T N 3"]:
    """Means of `grid` x `grid` equal blocks of each frame."""
    T, H, W, _ = points_THW3.shape
    if H % grid or W % grid:
        raise ValueError(f"point maps must have sides that are multiples of {grid} patches, got {W}x{H}")
    blocks = points_THW3.reshape(T, grid, H // grid, grid, W // grid, 3)
    return blocks.mean((2, 4)).reshape(T, grid * grid, 3)
