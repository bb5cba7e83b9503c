"""Trees of arrays: parameters by their paths, and states whose classes declare what every axis means."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

S = TypeVar("S", bound="State")
T = TypeVar("T")
Flat = dict[str, Any]
"""Parameters by path, such as decoder/layers/attn/q/kernel."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Flat:
    """{"a": {"b": x}} -> {"a/b": x}."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


class State:
    """Base of what is carried from token to token: a registered dataclass of fixed capacity.

    A field is a state of its own, or arrays whose axes it declares by `axes`; None where there is nothing.
    """


def axes(*names: str | None, of: Mapping[str, Any] | None = None) -> Any:
    """A field of arrays whose axes mean `names`: "batch" for rows, others of `sharding.LOGICAL_AXES` or of one's own.

    `of`: for a nested dict of arrays, the names of each by its keys.
    """
    return dataclasses.field(metadata={"axes": names if of is None else of})


def map_axes(f: Callable[..., Any], state: S) -> S:
    """`f(x, *meanings of its axes)` of each array of a state. Raises TypeError for an array that declares none."""
    changed = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if value is None or field.metadata.get("static"):
            continue
        if (names := field.metadata.get("axes")) is not None:
            changed[field.name] = _mapped(f, value, names, f"{type(state).__name__}.{field.name}")
        elif isinstance(value, State):
            changed[field.name] = map_axes(f, value)
        else:
            raise TypeError(f"{type(state).__name__}.{field.name} must be a State, or declare its axes by trees.axes")
    return dataclasses.replace(state, **changed)


def _mapped(f: Callable[..., Any], value: Any, names: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(f, x, names[key], f"{where}[{key!r}]") for key, x in value.items()}
    if len(names) != value.ndim:
        raise TypeError(f"{where} declares the axes {names}, but has the shape {value.shape}")
    return f(value, *names)


def put_row(state: S, row: S, n: Int32[Array, ""] | int) -> S:
    """`state` with its row n replaced by the only row of another such state: in place, where `state` is donated."""
    found = iter(jax.tree.leaves(row))

    def put(x: jax.Array, *names: str | None) -> jax.Array:
        new = next(found)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.asarray(new, x.dtype), n, names.index("batch"))

    return map_axes(put, state)


def get_row(state: S, n: Int32[Array, ""] | int) -> S:
    """Row n of a state as a state of one row."""
    return map_axes(lambda x, *names: jax.lax.dynamic_slice_in_dim(x, n, 1, names.index("batch")), state)


def fitted(tree: T, like: T) -> T:
    """The arrays of a tree in the shapes and the structure of `like`, filled up with zeros behind what there is."""
    found = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}

    def leaf(path: tuple, x: Any) -> jax.Array:
        old = found.get(jax.tree_util.keystr(path))
        if old is None:
            return jnp.zeros(x.shape, x.dtype)
        return jnp.pad(old, [(0, new - size) for size, new in zip(old.shape, x.shape, strict=True)])

    return jax.tree.map_with_path(leaf, like)


def to_host(state: State) -> dict[str, np.ndarray]:
    """The arrays of a state by their paths, as numpy arrays."""
    leaves = jax.device_get(jax.tree.leaves_with_path(state))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}


def from_host(like: S, arrays: Mapping[str, np.ndarray]) -> S:
    """The state of `to_host`, in the structure and shapes of `like`. Raises ValueError where these differ."""

    def leaf(path: tuple, x: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in arrays or arrays[name].shape != x.shape:
            found = arrays[name].shape if name in arrays else "nothing"
            raise ValueError(f"a state must hold {name} of the shape {x.shape}, got {found}")
        return arrays[name]

    return jax.tree.map_with_path(leaf, like)
