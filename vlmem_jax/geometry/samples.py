"""Points by which windows of frames are joined: one of each patch, with what it may be trusted. Pure numpy."""

import numpy as np
from jaxtyping import Bool, Float


def samples(
    points_NHW3: Float[np.ndarray, "N H W 3"],
    confidence_NHW: Float[np.ndarray, "N H W"],
    grid: int,
    least: float = 0.05,
    edge: float = 0.03,
) -> tuple[Float[np.ndarray, "N P 3"], Float[np.ndarray, "N P"]]:
    """The point of the pixel in the middle of each of P = grid x grid patches, in float64, and its weight.

    The same pixel of a frame shows the same point in every window, which a mean over a patch would not once some of its
    pixels are left out. The weight is the confidence; 0 where that is at most `least`, where the point is no number or
    not in front of the camera, and on edges, see `edges`.
    """
    _, H, W, _ = points_NHW3.shape
    high, wide = H // grid, W // grid
    middle = np.s_[:, high // 2 :: high, wide // 2 :: wide]
    points, confidence = points_NHW3[middle].astype(np.float64), confidence_NHW[middle].astype(np.float64)
    finite = np.isfinite(points).all(-1) & np.isfinite(confidence)
    points = np.where(finite[..., None], points, 0.0)
    on_edge = edges(points_NHW3[..., 2], high, wide, edge)
    trusted = finite & (points[..., 2] > 0) & (confidence > least) & ~on_edge
    weights = np.where(trusted, confidence, 0.0)
    return points.reshape(len(points), -1, 3), weights.reshape(len(points), -1)


def edges(
    depths_NHW: Float[np.ndarray, "N H W"], high: int, wide: int, part: float = 0.03
) -> Bool[np.ndarray, "N rows columns"]:
    """Where depths in the 3 x 3 pixels around the middle of each patch, high x wide pixels, differ by more than `part`
    of that in the middle: there, models of geometry draw a curtain from what is near to what is far (pi3's depth_edge).
    """
    H, W = depths_NHW.shape[1:]
    around = np.pad(depths_NHW, ((0, 0), (1, 1), (1, 1)), mode="edge")
    shifts = [(y, x) for y in range(3) for x in range(3)]
    near = [around[:, y : y + H, x : x + W][:, high // 2 :: high, wide // 2 :: wide] for y, x in shifts]
    with np.errstate(invalid="ignore"):  # points that are no numbers are left out anyway
        return np.max(near, 0) - np.min(near, 0) > part * np.abs(near[4])
