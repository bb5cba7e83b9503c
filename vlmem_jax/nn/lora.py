"""Low-rank adapters (LoRA, arXiv 2106.09685) of stacked layers, applied beside frozen weights.

Several adapters lie on a leading axis, and each row of a batch names its own. Without any, a program is the one that
knows nothing of them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.linear import Linear, fan_in_uniform, param, zeros


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """W x + (alpha / rank) B A x for each of `targets`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    """Share of the adapters' inputs that is left out, in training alone."""
    targets: tuple[str, ...] = ("q", "v")
    """Linear maps of the decoder's layers: q, k, v, o, gate, up, down."""

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be at least 1 and dropout at least 0 and below 1, got {self}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name each map once, and at least one; got {self.targets}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LinearMap(NamedTuple):
    """A linear map of a layer, as an adapter sees it."""

    path: str
    """Of its module in the layer."""
    inputs: tuple[str, int]
    outputs: tuple[str, int]
    """Meaning and size of what goes in and of what comes out, heads and head dim as one."""
    part: int | None = None
    """Its place on the first output axis of the kernel, where several maps are one."""


class LoRA(nnx.Module):
    """A and B of each target of one layer. B starts at 0, so that a fresh adapter changes nothing."""

    def __init__(self, config: LoRAConfig, maps: Mapping[str, LinearMap], *, rngs: nnx.Rngs):
        for target in config.targets:
            if target not in maps:
                raise ValueError(f"targets must be among {', '.join(maps)}; got {target!r}")
            (into, inputs), (out, outputs) = maps[target].inputs, maps[target].outputs
            a = param(fan_in_uniform(inputs), (inputs, config.rank), (into, "rank"), rngs)
            setattr(self, target, nnx.Dict(a=a, b=param(zeros, (config.rank, outputs), ("rank", out), rngs)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """What stacked layers apply: weights by target, as (A, B); row i of the batch takes adapter `index_B[i]`, and none
    where that is below 0. Without an index there is one adapter, which all rows take."""

    weights: dict[str, tuple[Float[Array, "L *A D R"], Float[Array, "L *A R F"]]]
    index_B: Int32[Array, "B"] | None
    scales: tuple[float, ...] = dataclasses.field(metadata=dict(static=True))
    """Of each adapter."""
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    key: jax.Array | None = None
    """None: no dropout."""

    @classmethod
    def of(
        cls,
        configs: Sequence[LoRAConfig],
        adapters: Sequence[LoRA],
        index_B: Int32[Array, "B"] | None = None,
        key: jax.Array | None = None,
    ) -> "Adapters":
        """Adapters of modules whose layers are stacked, one a config. Raises ValueError where rows would differ in
        dropout."""
        dropouts = {config.dropout for config in configs}
        if key is not None and len(dropouts) > 1:
            raise ValueError(f"adapters that rows of a batch choose among must have one dropout, got {dropouts}")
        rank, found = max(config.rank for config in configs), {}
        for adapter, config in zip(adapters, configs, strict=True):
            for target in config.targets:
                found.setdefault(target, getattr(adapter, target))

        def together(target: str, part: str) -> jax.Array:
            shape = list(found[target][part].shape)
            shape[2 if part == "a" else 1] = rank
            each = (getattr(adapter, target, None) for adapter in adapters)
            return jnp.stack([_padded(one and one[part][...], shape) for one in each], axis=1)

        if index_B is None:
            weights = {target: (ab["a"][...], ab["b"][...]) for target, ab in found.items()}
        else:
            weights = {target: (together(target, "a"), together(target, "b")) for target in found}
        return cls(weights, index_B, tuple(config.scale for config in configs), dropouts.pop(), key)

    def layer(self, weights: dict, number: Int32[Array, ""]) -> "LayerAdapters":
        """The adapters of layer `number`, whose slice of `weights` is given."""
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        if self.index_B is None:
            return LayerAdapters(weights, None, self.scales[0], self.dropout, key)
        chosen = {target: (a[self.index_B], b[self.index_B]) for target, (a, b) in weights.items()}
        scale = self.scales[0] if len(set(self.scales)) == 1 else jnp.array(self.scales)[self.index_B][:, None, None]
        return LayerAdapters(chosen, self.index_B >= 0, scale, self.dropout, key)


def _padded(x: jax.Array | None, shape: Sequence[int]) -> jax.Array:
    """x with zeros up to a shape; None: zeros alone."""
    if x is None:
        return jnp.zeros(shape, jnp.float32)
    return jnp.pad(x, [(0, size - now) for size, now in zip(shape, x.shape, strict=True)])


@dataclasses.dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer: a row's own for each row, or one for all."""

    weights: dict[str, tuple[Float[Array, "*B D R"], Float[Array, "*B R F"]]]
    on_B: Array | None
    """Which rows have one; None: all, the same."""
    scale: float | Float[Array, "B 1 1"]
    dropout: float
    key: jax.Array | None

    def added(self, target: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
        """y, which the map `target` makes of x, and what the adapters add; their first axis is that of rows, perhaps
        with the axes of tokens in it."""
        if target not in self.weights:
            return y
        a, b = (w.astype(y.dtype) for w in self.weights[target])
        x = _joined(x, a.shape[-2])
        if self.key is not None and self.dropout:
            key = jax.random.fold_in(self.key, sorted(self.weights).index(target))
            x = jnp.where(jax.random.bernoulli(key, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)
        if self.on_B is None:
            return y + (((x @ a) @ b) * self.scale).reshape(y.shape)
        x_BTD, y_BTF = (z.reshape(len(self.on_B), -1, z.shape[-1]) for z in (x, _joined(y, b.shape[-1])))
        change_BTF = jnp.einsum("BTR,BRF->BTF", jnp.einsum("BTD,BDR->BTR", x_BTD, a), b) * self.scale
        return jnp.where(self.on_B[:, None, None], y_BTF + change_BTF.astype(y.dtype), y_BTF).reshape(y.shape)


def _joined(x: Float[Array, "..."], size: int) -> Float[Array, "..."]:
    """x with its last axes, of `size` elements, as one."""
    n = next(n for n in reversed(range(x.ndim)) if math.prod(x.shape[n:]) == size)
    return x.reshape(*x.shape[:n], size)


def adapted(linear: Linear, target: str, x: Float[Array, "..."], lora: LayerAdapters | None) -> Float[Array, "..."]:
    """linear(x), and what an adapter of `target` adds, if there is one."""
    y = linear(x)
    return y if lora is None else lora.added(target, x, y)


def adapted_part(
    linear: Linear, n: int, target: str, x: Float[Array, "... D"], lora: LayerAdapters | None
) -> Float[Array, "... E"]:
    """linear.part(x, n), and what an adapter of `target` adds, if there is one."""
    y = linear.part(x, n)
    return y if lora is None else lora.added(target, x, y)
