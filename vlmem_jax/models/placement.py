"""How a model lies over devices: what answering takes by default, and what it costs where heads do not go round."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from vlmem_jax.config import ConfigError, build
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.models.vlm import VLM
from vlmem_jax.runtime.sharding import MeshConfig, param_shardings, shards, slices

HEADS = ("heads", "kv_heads")


def serving_mesh(vlm: VLM, devices: Sequence[jax.Device]) -> MeshConfig:
    """The mesh on which a model answers if nobody says otherwise.

    Heads, those of a memory too, are split over as many devices of a slice as share them evenly, rows over the rest.
    Weights lie where they are read: none is gathered for a token.
    """
    counts = {count for part, _, count, _, _ in _heads(vlm) if part != "vision"}
    tensor = math.gcd(len(devices) // slices(devices), *counts)
    return MeshConfig(data=len(devices) // tensor, fsdp=1, tensor=tensor)


def asked_mesh(sizes: Mapping[str, int], where: str) -> MeshConfig | None:
    """The mesh of the sizes that were named, None if none was; `data` takes the devices that are left.

    Raises ConfigError that begins with `where` for sizes out of range.
    """
    rest = {"data": 1 if -1 in sizes.values() else -1, "fsdp": 1}
    return build(MeshConfig, rest | dict(sizes), where) if sizes else None


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError, naming the keys, where query heads cannot be split over `mesh`."""
    parts, heads = mesh.shape["tensor"] * mesh.shape["context"], config.decoder.heads
    if heads % parts:
        raise ConfigError(f"mesh.tensor x mesh.context = {parts} must divide model.decoder.heads {heads}")


def whole_heads(vlm: VLM, mesh: Mesh, itemsize: int, cache: bool) -> list[str]:
    """A line for each kind of heads that `mesh.tensor` does not divide, with the bytes that a device holds of them.

    `itemsize`: bytes of a number of the parameters; `cache`: whether answers are written, with caches of such heads.
    """
    tensor, found = shards("kv_heads", mesh), defaultdict(int)
    places = param_shardings(mesh, vlm.abstract(), vlm.axes())
    for part, name, count, shape, place in _heads(vlm, places):
        if count % tensor:
            found[part, name, count] += math.prod(place.shard_shape(shape)) * itemsize
    said, c = [], vlm.config.decoder
    for (part, name, count), size in found.items():
        cost = f"{size:,} bytes of parameters, not {size // tensor:,}"
        if cache and (part, name) == ("decoder", "kv_heads"):
            token = 2 * c.layers * c.kv_heads * c.head_dim * vlm.dtype.itemsize
            cost += f", and {token:,} bytes of cache for each token of its rows, not {token // tensor:,}"
        said.append(
            f"mesh.tensor={tensor} does not divide the {count} {name} of model.{part}: a device holds all, {cost}"
        )
    return said


def _heads(vlm: VLM, places: dict | None = None) -> list[tuple]:
    """(part of the model, name, count, shape, place) of every parameter with an axis of heads."""
    shapes, axes, found = vlm.abstract(), vlm.axes(), []
    for part in shapes:

        def note(x, names, place, part=part):
            for name, size in zip(names, x.shape[x.ndim - len(names) :], strict=True):
                if name in HEADS:
                    found.append((part, name, size, x.shape, place))

        jax.tree.map(note, shapes[part], axes[part], shapes[part] if places is None else places[part])
    return found
