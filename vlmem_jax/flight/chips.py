"""TPU chips and the slices that they form, for predictions. Figures as published; link speeds one way."""

import dataclasses
import math
from collections.abc import Collection

from kernels_pallas.device import PEAKS, Peak


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Bytes and cycles a second."""

    peak: Peak
    hbm_bytes: int
    clock: float
    link: float
    """Of one link to a neighbour; a chip has two links along each axis of its torus."""
    network: float
    """Of a chip's share of its host's connection to other slices."""
    slices: tuple[str, ...]
    """Sizes that clouds offer, smallest first."""


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SOLID = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

CHIPS = {
    "v5e": Chip(PEAKS["v5e"], 16 * 2**30, 1.5e9, 45e9, 3.1e9, _FLAT),
    "v5p": Chip(PEAKS["v5p"], 95 * 2**30, 1.75e9, 90e9, 6.2e9, _SOLID),
    "v6e": Chip(PEAKS["v6e"], 32 * 2**30, 1.75e9, 90e9, 12.5e9, _FLAT),
}

_PASSES = {"all-reduce": 2, "collective-permute": 0.5}
"""How often the data of a collective cross the links; other kinds: once."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, such as v5p:4x4x4, or several alike that a data centre's network joins."""

    name: str
    slices: int = 1

    def __post_init__(self):
        chip, _, sizes = self.name.partition(":")
        if chip not in CHIPS or not sizes or not all(size.isdigit() and int(size) for size in sizes.split("x")):
            raise ValueError(
                f"a topology is one of {', '.join(CHIPS)}, a colon and sizes, such as v5p:4x4x4; got {self.name!r}"
            )
        if len(self.sizes) != len(self.chip.slices[0].split("x")):
            raise self.missing()
        if self.slices < 1:
            raise ValueError(f"there must be at least one slice, got {self.slices}")

    def missing(self) -> ValueError:
        """Says that there is no such slice, and which are nearest in chips."""
        near = sorted(self.chip.slices, key=lambda sizes: abs(math.log(_count(sizes) / _count(self._sizes))))[:3]
        chip = self.name.partition(":")[0]
        return ValueError(f"there is no slice {self.name}; the nearest are {', '.join(f'{chip}:{s}' for s in near)}")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def _sizes(self) -> str:
        return self.name.partition(":")[2]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of one slice."""
        return tuple(map(int, self._sizes.split("x")))

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.sizes)

    def seconds(self, kind: str, size: int, devices: int, axes: Collection[str]) -> float:
        """Least time of a collective of `size` bytes among `devices` chips along mesh axes, all links of use busy.

        A group of n chips is taken to span the largest torus axes; each of these carries data both ways. Between
        slices, over which `data` goes, each chip has its share of the network alone.
        """
        if devices < 2:
            return 0.0
        passes = _PASSES.get(kind, 1) * size
        if "data" not in axes or self.slices == 1:
            return passes * (devices - 1) / devices / self._bandwidth(devices)
        inside = devices // self.slices  # exchanged first, so that each chip sends on its part alone
        local = (inside - 1) / inside / self._bandwidth(inside)
        return passes * (local + (self.slices - 1) / self.slices / inside / self.chip.network)

    def _bandwidth(self, devices: int) -> float:
        spanned, axes = 1, 0
        for length in sorted(self.sizes, reverse=True):
            if spanned >= devices:
                break
            axes, spanned = axes + 1, spanned * length
        return 2 * self.chip.link * max(axes, 1)


def _count(sizes: str) -> int:
    return math.prod(map(int, sizes.split("x")))
