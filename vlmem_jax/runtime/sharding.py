"""The mesh, and the one table that maps what an axis means to where it lives. No other file names a mesh axis."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlmem_jax.trees import S, map_axes

MESH_AXES = ("data", "fsdp", "context", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
    # work that any of these devices can do alone: tiles in the vision tower, pieces of the loss
    "parts": ("data", "fsdp", "context"),
    # heads while each device has whole sequences of some of them (DeepSpeed-Ulysses, arXiv 2309.14509)
    "sequence_heads": ("tensor", "context"),
    # parameters: the input side of a weight is split over fsdp and gathered before use, the parallel side over tensor
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    # too small to split
    "head_dim": None,
    "qkv": None,
    "positions": None,
    "pixels": None,
    "pixels_x": None,
    "channels": None,
    "frames": None,
    "norm": None,
    "scalar": None,
    "rank": None,
    "slots": None,
    "layers": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one -1 takes what is left.

    `data` and `fsdp` split the rows of a batch, `fsdp` parameters too; `tensor` splits heads, MLPs and the vocabulary,
    `context` the tokens and tiles of each row. Of several slices, each takes an equal part of `data`.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes must be positive, at most one of them -1 (the rest); got {sizes}")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all); of several slices, the outer part of `data` goes from slice to slice.

    Raises ValueError if the sizes do not multiply to their number, or `data` does not split evenly over slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = list(dataclasses.astuple(config))
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        wanted = ", ".join(
            f"mesh.{axis}={size}" for axis, size in zip(MESH_AXES, dataclasses.astuple(config), strict=True)
        )
        raise ValueError(f"the mesh must use all {len(devices)} devices, but {wanted} do not multiply to that number")
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    count = slices(devices)
    if count == 1:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)
    if sizes[0] % count:
        raise ValueError(
            f"mesh.data must be a multiple of the {count} slices, whose links are too slow for other axes; got "
            f"{sizes[0]}; set mesh.data={count}"
        )
    inside, between = (sizes[0] // count, *sizes[1:]), (count, 1, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, between, devices), MESH_AXES, axis_types=axis_types)


def slices(devices: Sequence[jax.Device]) -> int:
    """Slices that the devices belong to; 1 where there is no such thing."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes mean `axes` (None: not split)."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def even_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """`spec` on the ambient mesh; axes of `shape` are split over as many of their mesh axes, from the first, as go
    evenly."""
    return _even(spec(*axes), shape, jax.sharding.get_abstract_mesh())


def param_sharding(mesh: Mesh, axes: tuple[str, ...], ndim: int) -> NamedSharding:
    """Sharding of a parameter whose last axes mean `axes`; axes before them stack layers and stay whole."""
    return NamedSharding(mesh, spec(*(None,) * (ndim - len(axes)), *axes))


def param_shardings(mesh: Mesh, abstract, axes):
    """`param_sharding` for a tree of shapes and the matching tree of axis names.

    An axis that the mesh cannot split evenly stays whole, such as a vocabulary of odd size.
    """

    def place(x, names: tuple[str, ...]) -> NamedSharding:
        return NamedSharding(mesh, _even(param_sharding(mesh, names, x.ndim).spec, x.shape, mesh))

    return jax.tree.map(place, abstract, axes)


def _even(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """`spec` without what the mesh cannot split evenly: of several mesh axes the first ones are kept."""

    def fit(size: int, names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if names is None or isinstance(names, str):
            return None if names and size % mesh.shape[names] else names
        while names and size % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        return names or None

    return PartitionSpec(*map(fit, shape, spec))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a Batch leaf: rows over `data` and `fsdp`, after `leading` whole axes."""
    return NamedSharding(mesh, spec(*(None,) * leading, "batch"))


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into; their number must be a multiple of it."""
    return shards("batch", mesh)


def shards(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Parts that an axis of this meaning is split into on a mesh (default: the ambient one, or 1 without)."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    names = LOGICAL_AXES[axis]
    return 1 if mesh.empty else math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))


def put(tree: Any, sharding: NamedSharding | None) -> Any:
    """Arrays of the host, the same on all hosts, on the devices; each host sends what its own ones hold."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, np.asarray(x).__getitem__), tree)


def replicate(tree: Any) -> Any:
    """Pins every array to all devices of the ambient mesh whole, so that any host can read it."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def lay_out(state: S, place: Callable[..., Any] | None = None) -> S:
    """Each array of a state over the ambient mesh as its axes say, whatever made it: what reads it is compiled once.

    Axes that the table does not know, a memory's own, stay whole. `place(x, *meanings)` in place of `constrain`.
    """

    def known(x: Any, *axes: str | None) -> Any:
        return (place or constrain)(x, *(axis if axis in LOGICAL_AXES else None for axis in axes))

    return map_axes(known, state)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation whose axes mean `axes` to the ambient mesh (`jax.set_mesh`); without one, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, even_spec(x.shape, *axes))


def gathered(params: Any, axes: Any) -> Any:
    """Parameters, the axes of which mean `axes`, whole but for what is split to be worked at side by side: gathered
    here, before a loop that would gather them each time round. Gradients are split as the parameters are."""
    if shards("embed") == 1:
        return params

    def whole(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
        split = *(None,) * (x.ndim - len(names)), *names

        @jax.custom_vjp
        def pinned(x: jax.Array) -> jax.Array:
            return constrain(x, *(None if name == "embed" else name for name in split))

        pinned.defvjp(lambda x: (pinned(x), None), lambda _, y: (constrain(y, *split),))
        return pinned(x)

    return jax.tree.map(whole, params, axes)
