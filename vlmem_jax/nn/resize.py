"""Linear interpolation of rows and columns, as products with constant matrices."""

import numpy as np
from jaxtyping import Float


def half_pixel(source: int, target: int) -> Float[np.ndarray, "t"]:
    """Where `target` pixels of equal size lie among `source` ones that cover the same length."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def corners_aligned(source: int, target: int) -> Float[np.ndarray, "t"]:
    """Where `target` points lie among `source` ones that begin and end with the same."""
    return np.linspace(0, source - 1, target)


def linear_weights(centres: Float[np.ndarray, "t"], source: int) -> Float[np.ndarray, "t s"]:
    """Weights of the `source` points at each of `centres`: without anti-aliasing, edges repeated."""
    centres = centres.clip(0, source - 1)
    low = np.floor(centres).astype(int)
    matrix, rows = np.zeros((len(centres), source)), np.arange(len(centres))
    np.add.at(matrix, (rows, low), 1 - (centres - low))
    np.add.at(matrix, (rows, np.minimum(low + 1, source - 1)), centres - low)
    return matrix


def area_weights(source: int, target: int) -> Float[np.ndarray, "t s"]:
    """Of each of `target` equal parts of a length, the share of it that each of `source` equal parts takes."""
    ends, starts = (np.arange(target) + 1)[:, None] * source / target, np.arange(target)[:, None] * source / target
    cells = np.arange(source)
    return np.clip(np.minimum(ends, cells + 1) - np.maximum(starts, cells), 0, None) * target / source
