"""From patch features to visual tokens: four neighbours become one token, an MLP maps it to the decoder's width."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.linear import param, spread
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm, RMSNorm
from vlmem_jax.nn.resize import half_pixel, linear_weights
from vlmem_jax.nn.stack import stack
from vlmem_jax.runtime.sharding import constrain
from vlmem_jax.vision.siglip import SigLIPConfig


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """`shuffle`: v2 keeps the orientation of the tile, v1 (older checkpoints) transposes it."""

    shuffle: Literal["v1", "v2"] = "v2"
    norm_eps: float = 1e-5


def pixel_shuffle(x_BPD: Float[Array, "B P D"], version: str) -> Float[Array, "B Q E"]:
    """Space to depth by 2: [B, (2s)^2, D] to [B, s^2, 4D], channels ordered (row, column, D)."""
    B, P, D = x_BPD.shape
    side = round(P**0.5) // 2
    x = x_BPD.reshape(B, side, 2, side, 2, D)
    x = x.transpose(0, 1, 3, 2, 4, 5) if version == "v2" else x.transpose(0, 3, 1, 2, 4, 5)
    return x.reshape(B, side * side, 4 * D)


class Projector(nnx.Module):
    """Pixel shuffle, LayerNorm, two-layer MLP."""

    def __init__(self, config: ProjectorConfig, vision_width: int, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.norm = LayerNorm(4 * vision_width, config.norm_eps, rngs=rngs)
        self.mlp = GeluMLP(4 * vision_width, width, width, rngs=rngs)

    def __call__(self, features_BPD: Float[Array, "B P D"]) -> Float[Array, "B Q E"]:
        return self.projected(features_BPD)

    def projected(self, features_BPD: Float[Array, "B P D"]) -> Float[Array, "B Q E"]:
        """As in `FrameProjector`: all that there is."""
        normed_BQE = self.norm(pixel_shuffle(features_BPD, self.config.shuffle))
        return self.mlp(constrain(normed_BQE, "parts", None, None))  # weights are gathered, however few the tiles

    def lined(self, x_BQE: Float[Array, "B Q E"]) -> Float[Array, "B Q E"]:
        """As in `FrameProjector`: as they are."""
        return x_BQE


class FrameProjector(nnx.Module):
    """A two-layer MLP of each patch, pooling of 2 x 2 neighbours, newlines among the visual tokens (LLaVA-Video)."""

    def __init__(self, config: SigLIPConfig, width: int, *, rngs: nnx.Rngs):
        self.pool, self.place = config.pool, config.newline
        self.mlp = GeluMLP(config.width, width, width, rngs=rngs)
        init, there = nnx.initializers.normal(width**-0.5), config.newline != "none"
        self.newline = param(init, (width,), ("norm",), rngs) if there else None

    def __call__(self, features_BPD: Float[Array, "B P D"]) -> Float[Array, "B Q E"]:
        return self.lined(self.projected(features_BPD))

    def projected(self, features_BPD: Float[Array, "B P D"]) -> Float[Array, "B N E"]:
        """Visual tokens without newlines."""
        x_BPE = self.mlp(constrain(features_BPD, "parts", None, None))
        side = round(x_BPE.shape[1] ** 0.5)
        x_BHWE = pooled(x_BPE.reshape(len(x_BPE), side, side, -1), self.pool)
        return x_BHWE.reshape(len(x_BHWE), -1, x_BHWE.shape[-1])

    def lined(self, x_BNE: Float[Array, "B N E"]) -> Float[Array, "B Q E"]:
        """The tokens with the newlines among them."""
        if self.newline is None:
            return x_BNE
        B, N, E = x_BNE.shape
        side = round(N**0.5)
        lines = (B, side, side, E) if self.place == "grid" else (B, 1, N, E)
        newline = spread(self.newline[...], (*lines[:2], 1, E), x_BNE.dtype)
        return jnp.concatenate([x_BNE.reshape(lines), newline], axis=2).reshape(B, -1, E)


def pooled(x_BHWD: Float[Array, "B H W D"], pool: str) -> Float[Array, "B h w D"]:
    """One for each 2 x 2 of a square of features, see `SigLIPConfig.pool`."""
    side = x_BHWD.shape[1]
    if pool == "bilinear":
        # half as many, rounded up
        weights = jnp.asarray(linear_weights(half_pixel(side, -(-side // 2)), side), jnp.float32)
        half = jnp.einsum("hH,BHWD->BhWD", weights, x_BHWD.astype(jnp.float32))
        return jnp.einsum("wW,BhWD->BhwD", weights, half).astype(x_BHWD.dtype)
    even = side // 2 * 2
    B, D = len(x_BHWD), x_BHWD.shape[-1]
    blocks = x_BHWD[:, :even, :even].reshape(B, even // 2, 2, even // 2, 2, D)
    if pool == "max":
        return blocks.max((2, 4))
    return blocks.astype(jnp.float32).mean((2, 4)).astype(x_BHWD.dtype)


class LevelMerger(nnx.Module):
    """LayerNorm of the `patches` that become one visual token, of each or of all as one, then an MLP (Qwen3-VL)."""

    def __init__(
        self, patches: int, vision_width: int, width: int, norm_eps: float, *, each: bool = False, rngs: nnx.Rngs
    ):
        inner = patches * vision_width
        self.norm = LayerNorm(vision_width if each else inner, norm_eps, rngs=rngs)
        self.mlp = GeluMLP(inner, inner, width, rngs=rngs)

    def __call__(self, features_BND: Float[Array, "B N D"]) -> Float[Array, "B I E"]:
        B, inner = len(features_BND), self.mlp.fc1.kernel.shape[0]
        normed = self.norm(features_BND.reshape(B, -1, self.norm.scale.shape[0]))
        return self.mlp(normed.reshape(B, -1, inner))


class DeepMerger(LevelMerger):
    """Visual tokens from the features of the last layer, and from those of others what is added to them later."""

    def __init__(self, patches: int, vision_width: int, width: int, norm_eps: float, levels: int, *, rngs: nnx.Rngs):
        sizes = patches, vision_width, width, norm_eps
        super().__init__(*sizes, each=True, rngs=rngs)
        self.levels = stack(lambda rngs: LevelMerger(*sizes, rngs=rngs), levels, rngs) if levels else None

    def deep(self, features_VBND: Float[Array, "V B N D"]) -> Float[Array, "V B I E"]:
        """What the first layers of the decoder add to visual tokens, from features of as many layers."""
        graph, states = nnx.split(self.levels)
        return jax.lax.scan(lambda _, xs: (None, nnx.merge(graph, xs[0])(xs[1])), None, (states, features_VBND))[1]


class Merger(nnx.Module):
    """RMSNorm of each patch, then a two-layer MLP over the `patches` that become one visual token (Qwen2.5-VL)."""

    def __init__(self, patches: int, vision_width: int, width: int, norm_eps: float, *, rngs: nnx.Rngs):
        inner = patches * vision_width
        self.norm = RMSNorm(vision_width, norm_eps, rngs=rngs)
        self.mlp = GeluMLP(inner, inner, width, rngs=rngs)

    def __call__(self, features_BND: Float[Array, "B N D"]) -> Float[Array, "B I E"]:
        normed_BND = self.norm(features_BND)
        return self.mlp(normed_BND.reshape(len(normed_BND), -1, self.mlp.fc1.kernel.shape[0]))
