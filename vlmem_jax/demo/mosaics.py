"""Mosaics of handwritten digits: pictures whose every cell has a known content."""

import dataclasses

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

CELL = 8
"""Side of a digit, pixels: the native size of scikit-learn's digits, one visual token of the demo's model."""
TRAIN_DIGITS = 1400
"""Handwritten digits that training images are made of; the rest, 397, is held out."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """A pool of handwritten digits."""

    images_NSS: UInt8[np.ndarray, "N 8 8"]
    labels_N: Int[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Mosaic:
    """A picture of tiles and the digit in each of its cells, top left first."""

    image: Image.Image
    digits_RC: Int[np.ndarray, "R C"]
    grid: tuple[int, int]
    """(columns, rows) of tiles."""

    @property
    def side(self) -> int:
        """Digits along a side of a tile."""
        return self.digits_RC.shape[0] // self.grid[1]


def load_digits() -> tuple[Digits, Digits]:
    """(train, held out): scikit-learn's 1,797 handwritten digits in a fixed random order, cut in two."""
    from sklearn import datasets  # an extra: only the demo needs it

    raw = datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(raw.target))
    images = np.round(raw.images[order] * (255 / 16)).astype(np.uint8)
    labels = raw.target[order].astype(np.int64)
    cut = TRAIN_DIGITS
    return Digits(images[:cut], labels[:cut]), Digits(images[cut:], labels[cut:])


def draw_mosaic(rng: np.random.Generator, pool: Digits, grid: tuple[int, int], side: int) -> Mosaic:
    """A mosaic of `grid` = (columns, rows) tiles with `side` digits along each side.

    Every digit is drawn anew, shifted by up to a pixel and re-inked.
    """
    cols, rows = grid
    shape = (rows * side, cols * side)
    chosen = rng.integers(len(pool.labels_N), size=shape)
    cells = np.pad(pool.images_NSS[chosen].astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
    down, right = rng.integers(0, 3, (2, *shape, 1, 1))
    index = np.arange(CELL)
    r, c = np.ogrid[: shape[0], : shape[1]]
    shifted = cells[r[..., None, None], c[..., None, None], index[:, None] + down, index + right]
    inked = shifted * rng.uniform(0.7, 1.1, (*shape, 1, 1))
    pixels = np.minimum(inked, 255).swapaxes(1, 2).reshape(shape[0] * CELL, shape[1] * CELL)
    return Mosaic(Image.fromarray(pixels.astype(np.uint8)), pool.labels_N[chosen], grid)
