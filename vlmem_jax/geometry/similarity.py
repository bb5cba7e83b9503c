"""Similarity transforms of space, and the one that best brings points onto others (Umeyama 1991). Pure numpy."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEAST = 10
"""Points that a fit needs; with fewer, one wrong point turns a scene."""
STRAIGHT = 1e-8
"""Part of their spread along a line that points must have across it: about a line they may turn as they like."""


class Similarity(NamedTuple):
    """x -> scale * rotation x + shift, in float64."""

    scale: float
    rotation_33: Float[np.ndarray, "3 3"]
    shift_3: Float[np.ndarray, "3"]

    @classmethod
    def of_camera(cls, pose_44: Float[np.ndarray, "4 4"]) -> "Similarity":
        """What a camera sees, in the world that it stands in."""
        pose_44 = np.asarray(pose_44, np.float64)
        return cls(1.0, pose_44[:3, :3], pose_44[:3, 3])

    def points(self, points: Float[np.ndarray, "*any 3"]) -> Float[np.ndarray, "*any 3"]:
        """Where points come to lie."""
        return self.scale * np.asarray(points, np.float64) @ self.rotation_33.T + self.shift_3

    def poses(self, poses: Float[np.ndarray, "*any 4 4"]) -> Float[np.ndarray, "*any 4 4"]:
        """Where cameras come to stand; they stay rigid, and what they see becomes `scale` times as large."""
        moved = np.array(poses, np.float64)
        moved[..., :3, :3] = self.rotation_33 @ moved[..., :3, :3]
        moved[..., :3, 3] = self.points(moved[..., :3, 3])
        return moved

    def __matmul__(self, first: "Similarity") -> "Similarity":
        """`first`, then this one."""
        return Similarity(self.scale * first.scale, self.rotation_33 @ first.rotation_33, self.points(first.shift_3))

    def inverse(self) -> "Similarity":
        back_33 = self.rotation_33.T
        return Similarity(1 / self.scale, back_33, -(back_33 @ self.shift_3) / self.scale)


IDENTITY = Similarity(1.0, np.eye(3), np.zeros(3))


def fit(
    from_N3: Float[np.ndarray, "N 3"], to_N3: Float[np.ndarray, "N 3"], weights_N: Float[np.ndarray, "N"]
) -> Similarity | None:
    """The similarity that brings points nearest to their partners, in weighted least squares (Umeyama 1991, eq. 34-43).

    Pairs of weight 0 are left out. None where fewer than LEAST are left, or where they leave a turn open: all in one
    place or on one line. Mirrored points give the best rotation, never a reflection.
    """
    used_N = weights_N > 0
    if used_N.sum() < LEAST:
        return None
    weights_N1 = weights_N[used_N, None].astype(np.float64)
    weights_N1 /= weights_N1.sum()
    from_N3, to_N3 = (x[used_N].astype(np.float64) for x in (from_N3, to_N3))
    from_3, to_3 = (np.sum(weights_N1 * x, 0) for x in (from_N3, to_N3))
    from_N3, to_N3 = from_N3 - from_3, to_N3 - to_3
    left_33, spread_3, right_33 = np.linalg.svd((weights_N1 * to_N3).T @ from_N3)
    variances = [np.sum(weights_N1 * x**2) for x in (from_N3, to_N3)]
    if spread_3[1] <= STRAIGHT * np.sqrt(np.prod(variances)):
        return None
    signs_3 = np.array([1.0, 1.0, np.sign(np.linalg.det(left_33) * np.linalg.det(right_33))])
    rotation_33 = left_33 * signs_3 @ right_33
    scale = float(spread_3 @ signs_3 / variances[0])
    return Similarity(scale, rotation_33, to_3 - scale * rotation_33 @ from_3)


def residual(
    similarity: Similarity,
    from_N3: Float[np.ndarray, "N 3"],
    to_N3: Float[np.ndarray, "N 3"],
    weights_N: Float[np.ndarray, "N"],
) -> float:
    """How far a fit leaves points from their partners, as a part of the partners' spread about their mean (both root
    mean squares): 0 where they meet, 1 where a single point would fit as well."""
    used_N = weights_N > 0
    weights_N1 = weights_N[used_N, None].astype(np.float64)
    weights_N1 /= weights_N1.sum()
    from_N3, to_N3 = (x[used_N].astype(np.float64) for x in (from_N3, to_N3))
    left_N3, about_N3 = to_N3 - similarity.points(from_N3), to_N3 - np.sum(weights_N1 * to_N3, 0)
    return float(np.sqrt(np.sum(weights_N1 * left_N3**2) / np.sum(weights_N1 * about_N3**2)))
