"""Do the tensors that came fit those that are needed? All that does not is said at once, with what may be meant."""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax import families
from vlmem_jax.hub.leaves import FromTensors
from vlmem_jax.models import ModelConfig
from vlmem_jax.records import Rule
from vlmem_jax.trees import unflatten

BUFFERS = (".inv_freq",)
"""Endings of tensors that some checkpoints carry along and that follow from the config."""
FLOATS = ("float32", "bfloat16", "float16")


def check_fit(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    what: str,
    unread: Callable[[str], Any] = lambda name: False,
) -> None:
    """Raises ValueError listing every tensor of `what` that is missing, unknown, of another shape or dtype; those with
    `unread` names may be there or not.

    The nearest name is given with each; layers that differ alike share a line.
    """
    wanted = {name: rule.shape for rule in rules for name in rule.names}
    copies = {name for rule in rules for name in rule.copies}
    found = [name for name in tensors if not (name.endswith(BUFFERS) or name in copies or unread(name))]
    missing = _by_layer(name for name in wanted if name not in tensors)
    unknown = _by_layer(name for name in found if name not in wanted)
    lines = [f"missing: {_show(*item)}{_nearest(item[0], unknown)}" for item in missing.items()]
    lines += [f"unknown: {_show(*item)}{_nearest(item[0], missing or _by_layer(wanted))}" for item in unknown.items()]
    for (have, need), names in _differing(wanted, tensors).items():
        alike = _by_layer(name for name in found if name not in wanted and tensors[name].shape == need)
        lines += [
            f"wrong shape: {_show(*item)} is {list(have)}, must be {list(need)}{_nearest(item[0], alike)}"
            for item in _by_layer(names).items()
        ]
    present = [[tensors[name] for name in rule.names if name in tensors] for rule in rules]
    for rule, group in zip(rules, present, strict=True):
        dtypes = sorted({tensor.dtype.name for tensor in group})
        if len(dtypes) > 1 or not set(dtypes) <= set(FLOATS):
            pattern = next(iter(_by_layer(rule.names)))
            lines.append(f"wrong dtype: {pattern} is {' and '.join(dtypes)}, must be one of {', '.join(FLOATS)}")
    if lines:
        lines = list(dict.fromkeys(lines))
        raise ValueError(f"{what} does not fit the model; {len(lines)} differences:\n  " + "\n  ".join(lines))


def parameters(
    rules: Sequence[Rule],
    tensors: Mapping[str, np.ndarray],
    dtype_of: Callable[[str], jax.typing.DTypeLike],
    what: str,
    unread: Callable[[str], Any],
) -> dict[str, Any]:
    """What `rules` make of tensors, on this host's first device, each in the dtype that its path has; one after the
    other, to need little memory. Raises ValueError as `check_fit`, and for numbers that are not finite."""
    check_fit(rules, tensors, what, unread)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves = {rule.ours: FromTensors(rule, tensors) for rule in rules}
    return unflatten({path: leaf.array(place, jnp.dtype(dtype_of(path))) for path, leaf in leaves.items()})


def from_arrays(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict:
    """Tensors by their Hugging Face name -> the model's parameters; see `assemble`."""
    family = families.of_model(config)
    return assemble(family.name_table(config, family.layout(tensors), None), tensors)


def assemble(rules: Sequence[Rule], tensors: Mapping[str, np.ndarray]) -> dict:
    """The parameters that `rules` make of tensors, as numpy arrays of the same dtype.

    Raises ValueError listing all tensors that are missing, unknown or of another shape.
    """
    check_fit(rules, tensors, "the set of tensors")
    return unflatten({rule.ours: FromTensors(rule, tensors).read(()) for rule in rules})


def _differing(wanted: Mapping[str, tuple], tensors: Mapping[str, np.ndarray]) -> dict[tuple, list[str]]:
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, shape in wanted.items():
        if name in tensors and tensors[name].shape != shape:
            groups[tensors[name].shape, shape].append(name)
    return groups


def _by_layer(names: Iterable[str]) -> dict[str, list[int]]:
    """Names with the number of the layer cut out -> the numbers that occur."""
    groups: dict[str, list[int]] = defaultdict(list)
    for name in names:
        found = re.search(r"\b(?:layers|\w*blocks|decoder|trunk)\.(\d+)(?=\.)", name)
        if found:
            groups[f"{name[: found.start(1)]}*{name[found.end() :]}"].append(int(found[1]))
        else:
            groups[name] = []
    return groups


def _show(pattern: str, layers: list[int]) -> str:
    if not layers:
        return pattern
    consecutive = len(layers) > 2 and sorted(layers) == list(range(min(layers), max(layers) + 1))
    numbers = f"{min(layers)}-{max(layers)}" if consecutive else ", ".join(map(str, sorted(layers)))
    return f"{pattern} (layers {numbers})"


def _nearest(pattern: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(pattern, list(candidates), 1, cutoff=0.4)
    return f"; nearest: {near[0]}" if near else ""
