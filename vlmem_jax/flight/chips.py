"""What a TPU chip can do, for predictions. Peaks as published; link speeds one way, per link."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; all cores together."""

    hbm_bytes: int
    flops: float
    """bf16 multiply-adds a second, times two."""
    clock: float
    """Cycles a second."""
    link: float
    """Bytes a second of one link, one way; a chip has two links along each axis of its torus."""


CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 1.5e9, 45e9),
    "v5p": Chip(95 * 2**30, 459e12, 1.75e9, 90e9),
    "v6e": Chip(32 * 2**30, 918e12, 1.75e9, 90e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, such as v5p:4x4x4."""

    name: str

    def __post_init__(self):
        chip, _, sizes = self.name.partition(":")
        if chip not in CHIPS or not sizes or not all(size.isdigit() and int(size) for size in sizes.split("x")):
            raise ValueError(
                f"a topology is one of {', '.join(CHIPS)}, a colon and sizes, such as v5p:4x4x4; got {self.name!r}"
            )

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(int, self.name.partition(":")[2].split("x")))

    def seconds(self, kind: str, size: int, devices: int) -> float:
        """Least time of a collective of `size` bytes among `devices` chips, with every link that they can use busy.

        A group of n chips is taken to span the largest torus axes; each of these carries data both ways.
        """
        if devices < 2:
            return 0.0
        axes, spanned = 0, 1
        for length in sorted(self.sizes, reverse=True):
            if spanned >= devices:
                break
            axes, spanned = axes + 1, spanned * length
        bandwidth = 2 * self.chip.link * max(axes, 1)
        passes = {"all-reduce": 2, "collective-permute": 0.5}.get(kind, 1)
        return passes * size * (devices - 1) / devices / bandwidth

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)
