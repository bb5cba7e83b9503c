"""Plain records that memories and families hand upward, so that no layer is crossed: what checkpoints call things.

One tensor name table serves both directions: a rule says which part of a foreign tensor is which of our leaves.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` is the part `pick` of the tensors `names`, its axes reordered as `pattern` says.

    pattern: "theirs -> ours" in named axes, "(K R)" joins axes that are one there, "1" is an axis of one,
    e.g. "(K R C) D -> D (K R) C".
    names: one tensor, or, if `stacked`, one a layer.
    pick: axis -> index (the axis goes away) or slice.
    copies: tensors that may stand beside and hold the same, such as the head of a tied model.
    """

    ours: str
    names: tuple[str, ...]
    pattern: str
    sizes: Mapping[str, int]
    stacked: bool = False
    pick: Mapping[str, int | slice] = dataclasses.field(default_factory=dict)
    copies: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[list[list[str]], list[list[str]]]:
        """Their axes and ours, as the names that each joins."""
        theirs, ours = self.pattern.split("->")
        return _groups(theirs), _groups(ours)

    def _size(self, axis: str) -> int:
        return int(axis) if axis.isdigit() else self.sizes[axis]

    def _picked(self, axis: str) -> int:
        pick = self.pick.get(axis, slice(None))
        return len(range(self._size(axis))[pick])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape that each of `names` must have."""
        return tuple(math.prod(map(self._size, group)) for group in self.groups[0])

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Shape of our leaf."""
        layer = tuple(math.prod(map(self._picked, group)) for group in self.groups[1])
        return (len(self.names), *layer) if self.stacked else layer

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """Their contiguous tensor as one layer of ours, without a copy: read it to import, assign to it to export.

        The elements come in our order, but axes that only ours joins stay apart: reshape ours to the view's shape.
        """
        axes = [axis for group in self.groups[0] for axis in group]
        tensor = tensor.reshape([self._size(axis) for axis in axes])
        tensor = tensor[tuple(self.pick.get(axis, 0 if axis == "1" else slice(None)) for axis in axes)]
        axes = [axis for axis in axes if axis != "1" and not isinstance(self.pick.get(axis), int)]
        return tensor.transpose([axes.index(axis) for group in self.groups[1] for axis in group])


def section(
    ours: str, theirs: str, sizes: Mapping[str, int], rows: Sequence[tuple], layers: range | None = None
) -> list[Rule]:
    """Rules of (our leaf, their tensor, pattern, perhaps pick) below the prefixes `ours` and `theirs`.

    With `layers`, leaves are stacked over them, and `theirs` holds {} for the number of one.
    """
    names = [theirs] if layers is None else [theirs.format(layer) for layer in layers]
    return [
        Rule(ours + leaf, tuple(name + tensor for name in names), pattern, sizes, layers is not None, *pick)
        for leaf, tensor, pattern, *pick in rows
    ]


def own_tensors(name: str, leaves: Mapping[str, Any]) -> list[Rule]:
    """Rules of a memory whose tensors nobody has named: `NAME.` and our path, a tensor a leaf, layers stacked."""
    found = []
    for path, leaf in leaves.items():
        axes = "abcdefgh"[: len(leaf.shape)]
        pattern, sizes = " ".join(axes), dict(zip(axes, leaf.shape, strict=True))
        found.append(Rule(f"memory/{path}", (f"{name}.{path.replace('/', '.')}",), f"{pattern} -> {pattern}", sizes))
    return found


def _groups(axes: str) -> list[list[str]]:
    return [(joined or single).split() for joined, single in re.findall(r"\(([^)]*)\)|(\S+)", axes)]


def ours(names: Mapping[str, str], section: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of what a section says; `names` maps our key to theirs."""
    return {ours: section[theirs] for ours, theirs in names.items() if section.get(theirs) is not None}


def theirs(names: Mapping[str, str], config: Any) -> dict[str, Any]:
    """Their keys of what our dataclass says."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def check_needed(section: str, names: Mapping[str, str], found: Mapping[str, Any], needed: str) -> None:
    """Raises ValueError naming the keys that are needed and missing."""
    missing = [f"{section}.{names[key]}".lstrip(".") for key in needed.split() if found.get(key) is None]
    if missing:
        raise ValueError(f"config.json must have {', '.join(missing)}")


def check_fixed(fixed: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Raises ValueError where a key, `section.key` or `key`, is there and has another value than the supported one."""
    wrong = []
    for key, value in fixed.items():
        *section, name = key.split(".")
        found = (content.get(section[0], {}) if section else content).get(name, value)
        if found != value:
            wrong.append(f"{key} must be {value!r}, got {found!r}")
    if wrong:
        raise ValueError(f"config.json describes a model that is not supported: {'; '.join(wrong)}")
