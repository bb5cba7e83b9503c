"""The mesh, and the one table that maps what an axis means to where it lives. No other file names a mesh axis."""

import dataclasses
import math

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "tensor")

LOGICAL_AXES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "tokens": "context",
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
    "norm": None,
    "scalar": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one -1 takes what is left. `context` splits long sequences."""

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh sizes must be positive, at most one of them -1 (the rest); got {sizes}")
        if self.context != 1:
            raise ValueError(f"mesh.context must be 1: sequences are not split over devices yet; got {self.context}")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over `devices` (default: all). Raises ValueError if the sizes do not multiply to their number."""
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
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def spec(*axes: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes mean `axes` (None: not split)."""
    return PartitionSpec(*(None if axis is None else LOGICAL_AXES[axis] for axis in axes))


def even_spec(shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """`spec` on the ambient mesh; axes of `shape` that it cannot split evenly stay whole."""
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
    """`spec` without the axes of `shape` that the mesh cannot split evenly."""

    def parts(names: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[name] for name in ((names,) if isinstance(names, str) else names or ()))

    return PartitionSpec(*(None if size % parts(names) else names for size, names in zip(shape, spec, strict=False)))


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of a Batch leaf: rows over `data` and `fsdp`, after `leading` whole axes."""
    return NamedSharding(mesh, spec(*(None,) * leading, "batch"))


def batch_shards(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into; their number must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation whose axes mean `axes` to the ambient mesh (`jax.set_mesh`); without one, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, even_spec(x.shape, *axes))
