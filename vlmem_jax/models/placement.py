"""How a model lies over devices: what answering takes by default."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from vlmem_jax.config import ConfigError, build
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.models.vlm import VLM
from vlmem_jax.sharding import MeshConfig, slices

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
