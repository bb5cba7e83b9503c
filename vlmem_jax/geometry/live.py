"""Geometry of the frames of a stream, as it comes: for `vlmem stream`."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from vlmem_jax.geometry.pictures import pictures
from vlmem_jax.geometry.store import Seer
from vlmem_jax.geometry.windows import Placed, Windows, WindowsConfig
from vlmem_jax.trees import from_host, to_host
from vlmem_jax.types import Geometry


class Known(NamedTuple):
    """A frame whose geometry has come."""

    number: int
    """Of the frame, from 0."""
    geometry: Geometry | None
    """[N, ...]; None where there is nothing of use."""
    says: str | None
    """What is worth a note."""


class LiveGeometry:
    """What a model of geometry makes of frames that never end, by `Windows`: some frames later."""

    def __init__(self, seer: Seer, side: int, **options):
        """`side`: pixels along a side of the frames that come in; `options`: keys of `WindowsConfig`."""
        self.seer, self._grid = seer, math.isqrt(seer.reads.patches)
        config = WindowsConfig(grid=self._grid, confidence_weighted=seer.by_confidence, **options)
        self._windows = Windows(config, lambda images_NHWc: seer.model.scene(images_NHWc, confidence=True))
        height, width, _ = self._cut(np.zeros((side, side, 3), np.uint8)).shape
        self._walk = self._windows.begin(height, width)

    @property
    def digest(self) -> str:
        """Tells what the geometry depends on, beside the frames."""
        return self.seer.digest

    def push(self, tile_SSc: UInt8[np.ndarray, "S S c"]) -> list[Known]:
        """Takes the next frame; gives those that are known by now, in order."""
        self._walk, placed = self._windows.push(self._walk, self._cut(tile_SSc))
        return list(map(_known, placed))

    def rest(self) -> list[Known]:
        """Frames that still wait, where no more come."""
        self._walk, placed = self._windows.flush(self._walk)
        return list(map(_known, placed))

    def save(self) -> dict[str, np.ndarray]:
        """All that later frames depend on."""
        return to_host(self._walk)

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `save` gave. Raises ValueError where it does not fit."""
        self._walk = from_host(self._walk, arrays)

    def _cut(self, tile_SSc: np.ndarray) -> np.ndarray:
        return pictures(tile_SSc[None], self._grid * self.seer.model.patch_size, self.seer.fit)[0]


def _known(placed: Placed) -> Known:
    join, says = placed.join, placed.fault
    if says is None and join.cut:
        says = "the video was cut, or nothing seen before is in sight: places begin anew"
    if says is None and join.identity:
        says = f"{join.common} points are known of those in sight, too few to place the frame among those before"
    return Known(placed.number, placed.geometry, says)
