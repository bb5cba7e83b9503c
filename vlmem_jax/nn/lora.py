"""Low-rank adapters (LoRA, arXiv 2106.09685) of stacked decoder layers, applied beside frozen weights.

Several adapters lie on a leading axis, and each row of a batch names its own. Without any, the decoder's program is the
one that knows nothing of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.linear import Linear, fan_in_uniform, param, zeros

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
"""A linear map of a decoder layer."""


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """W x + (alpha / rank) B A x for each of `targets`."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    """Share of the adapters' inputs that is left out, in training alone."""
    targets: tuple[Target, ...] = ("q", "v")

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be at least 1 and dropout at least 0 and below 1, got {self}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must name each map once, and at least one; got {self.targets}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Shapes = dict[str, tuple[tuple[str, int], tuple[str, int]]]
"""Of each target: meaning and size of what goes in and of what comes out, heads and head dim as one."""


class LoRA(nnx.Module):
    """A and B of each target of one layer. B starts at 0, so that a fresh adapter changes nothing."""

    def __init__(self, config: LoRAConfig, shapes: Shapes, *, rngs: nnx.Rngs):
        for target in config.targets:
            (into, inputs), (out, outputs) = shapes[target]
            a = param(fan_in_uniform(inputs), (inputs, config.rank), (into, "rank"), rngs)
            setattr(self, target, nnx.Dict(a=a, b=param(zeros, (config.rank, outputs), ("rank", out), rngs)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapters:
    """What the decoder applies: weights by target, as (A, B); row i of the batch takes adapter `index_B[i]`."""

    weights: dict[str, tuple[Float[Array, "L A D R"], Float[Array, "L A R F"]]]
    index_B: Int32[Array, "B"]
    scale: float = dataclasses.field(metadata=dict(static=True))
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    key: jax.Array | None = None
    """None: no dropout."""

    @classmethod
    def of(
        cls, config: LoRAConfig, adapters: Sequence[LoRA], index_B: Int32[Array, "B"], key: jax.Array | None = None
    ) -> "Adapters":
        """Of modules whose layers are stacked."""

        def together(target: str, part: str) -> jax.Array:
            return jnp.stack([getattr(adapter, target)[part][...] for adapter in adapters], axis=1)

        weights = {target: (together(target, "a"), together(target, "b")) for target in config.targets}
        return cls(weights, index_B, config.scale, config.dropout, key)

    def layer(self, weights: dict, number: Int32[Array, ""]) -> "LayerAdapters":
        """Those of layer `number`, whose slice of `weights` is given."""
        key = None if self.key is None else jax.random.fold_in(self.key, number)
        chosen = {target: (a[self.index_B], b[self.index_B]) for target, (a, b) in weights.items()}
        return LayerAdapters(chosen, self.scale, self.dropout, key)


@dataclasses.dataclass(frozen=True)
class LayerAdapters:
    """The adapters of one layer, a row's own for each row."""

    weights: dict[str, tuple[Float[Array, "B D R"], Float[Array, "B R F"]]]
    scale: float
    dropout: float
    key: jax.Array | None

    def change(self, target: str, x_BTD: Float[Array, "B T *D"]) -> Float[Array, "B T F"]:
        """What the adapter of `target` adds to its output for the input x."""
        a_BDR, b_BRF = (w.astype(x_BTD.dtype) for w in self.weights[target])
        x_BTD = x_BTD.reshape(*x_BTD.shape[:2], -1)
        if self.key is not None and self.dropout:
            key = jax.random.fold_in(self.key, sorted(self.weights).index(target))
            kept_BTD = jax.random.bernoulli(key, 1 - self.dropout, x_BTD.shape)
            x_BTD = jnp.where(kept_BTD, x_BTD / (1 - self.dropout), 0)
        return jnp.einsum("BTR,BRF->BTF", jnp.einsum("BTD,BDR->BTR", x_BTD, a_BDR), b_BRF) * self.scale


def adapted(linear: Linear, target: str, x: Float[Array, "..."], lora: LayerAdapters | None) -> Float[Array, "..."]:
    """linear(x), and what an adapter of `target` adds, if there is one."""
    y = linear(x)
    if lora is None or target not in lora.weights:
        return y
    return y + lora.change(target, x).reshape(y.shape)
