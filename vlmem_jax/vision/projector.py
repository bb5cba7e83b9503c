"""From patch features to visual tokens: four neighbours become one token, an MLP maps it to the decoder's width."""

import dataclasses
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm, RMSNorm
from vlmem_jax.runtime.sharding import constrain


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
        normed_BQE = self.norm(pixel_shuffle(features_BPD, self.config.shuffle))
        return self.mlp(constrain(normed_BQE, "parts", None, None))  # weights are gathered, however few the tiles


class Merger(nnx.Module):
    """RMSNorm of each patch, then a two-layer MLP over the `patches` that become one visual token (Qwen2.5-VL)."""

    def __init__(self, patches: int, vision_width: int, width: int, norm_eps: float, *, rngs: nnx.Rngs):
        inner = patches * vision_width
        self.norm = RMSNorm(vision_width, norm_eps, rngs=rngs)
        self.mlp = GeluMLP(inner, inner, width, rngs=rngs)

    def __call__(self, features_BND: Float[Array, "B N D"]) -> Float[Array, "B I E"]:
        normed_BND = self.norm(features_BND)
        return self.mlp(normed_BND.reshape(len(normed_BND), -1, self.mlp.fc1.kernel.shape[0]))
