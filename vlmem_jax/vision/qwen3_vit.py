"""The vision tower of Qwen3-VL (arXiv 2511.21631): images and videos of any size, packed on one axis.

Patches attend within frames in every layer, in row-major order of their blocks. A learned table of positions is
interpolated to the size of each frame, and patches turn by their row and column, too. Features of a few layers go on
beside those of the last one, to the first layers of the decoder (DeepStack, arXiv 2406.04334).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.nn.embedding import look_up
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.lora import LinearMap
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import stack
from vlmem_jax.types import StepGeometry, TileShape
from vlmem_jax.vision.patch_tower import PatchAttention, PatchLayer, PatchTower

COUNTED_FRAME = 64
"""Visual tokens of the smallest image that the released processors make."""


@dataclasses.dataclass(frozen=True)
class Qwen3ViTConfig:
    """Sizes of the tower; patch_size in pixels."""

    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp_width: int = 4304
    patch_size: int = 16
    patch_frames: int = 2
    """Frames of a video that a patch spans; an image fills them with copies."""
    merge: int = 2
    """Patches along a side of the block that becomes one visual token."""
    position_grid: int = 48
    """Side of the table of positions: its corners lie on the corners of each frame."""
    deep_layers: tuple[int, ...] = (8, 16, 24)
    """Layers, rising, whose outputs become what the decoder's first layers add to visual tokens, a layer each."""
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each colour, as a fraction of 255."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    kind: Literal["qwen3_vit"] = "qwen3_vit"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads {self.heads}, got {self.width}")
        if self.position_grid < 2:
            raise ValueError(f"position_grid must be at least 2, a position a corner, got {self.position_grid}")
        rising = (-1, *self.deep_layers, self.layers)
        if any(layer >= after for layer, after in zip(rising, rising[1:], strict=False)):
            raise ValueError(f"deep_layers must rise within 0 to {self.layers - 1}, got {self.deep_layers}")

    @property
    def geometry(self) -> StepGeometry:
        """What cutting images into patches needs to know."""
        return StepGeometry(self.patch_size, self.patch_frames, self.merge, window=0, tokens_per_second=0.0)

    @property
    def tile(self) -> TileShape:
        """A tile is a block of patches."""
        channels = 3 * self.patch_frames * self.patch_size**2
        return TileShape(side=self.merge, channels=channels, tokens=1, layout=True, axes=3)

    @property
    def linear_maps(self) -> dict[str, LinearMap]:
        """The maps of a layer by the name that adapters have for them."""
        embed, heads, mlp = ("embed", self.width), ("heads", self.width), ("mlp", self.mlp_width)
        maps = {name: LinearMap("attn/qkv", embed, heads, n) for n, name in enumerate("qkv")}
        maps |= {"proj": LinearMap("attn/proj", heads, embed)}
        return maps | {"fc1": LinearMap("mlp/fc1", embed, mlp), "fc2": LinearMap("mlp/fc2", mlp, embed)}

    @property
    def flops(self) -> tuple[int, int]:
        """Forward FLOPs of a tile: in weights, and in attention. It depends on the images how large frames are: each
        counts as one of COUNTED_FRAME tiles, so that of larger ones more is computed than is counted."""
        patches = self.merge**2
        weights = patches * self.width * (self.tile.channels + self.layers * (4 * self.width + 2 * self.mlp_width))
        return 2 * weights, self.layers * 4 * patches * COUNTED_FRAME * patches * self.width

    def projector_flops(self, width: int) -> int:
        """Forward FLOPs of the mergers to a decoder of this width, for a tile."""
        inner = self.merge**2 * self.width
        return 2 * (inner * inner + inner * width) * (1 + len(self.deep_layers))

    def channels(self, colours: tuple[float, float, float]) -> tuple[float, ...]:
        """A number of each colour as one of each value of a patch."""
        return tuple(np.repeat(colours, self.patch_frames * self.patch_size**2).tolist())


class Qwen3ViTLayer(PatchLayer):
    """Pre-norm attention and two-layer MLP."""

    def __init__(self, config: Qwen3ViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.norm2 = LayerNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = PatchAttention(config, attention, rngs=rngs)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.width, tanh=True, rngs=rngs)


class Qwen3ViT(PatchTower):
    """Blocks of patches, with learned positions, to patch features of several layers."""

    def __init__(self, config: Qwen3ViTConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        p = config.patch_size
        values = {"channels": 3, "frames": config.patch_frames, "pixels": p, "pixels_x": p}
        self.patch = Linear(values, {"embed": config.width}, bias=True, rngs=rngs)
        table = config.position_grid**2, config.width
        self.position_embedding = param(nnx.initializers.normal(0.02), table, ("positions", "embed"), rngs)
        self.layers = stack(lambda rngs: Qwen3ViTLayer(config, attention, rngs=rngs), config.layers, rngs)

    @property
    def deep_layers(self) -> tuple[int, ...]:
        return self.config.deep_layers

    def enter(self, pixels_BISSc: Float[Array, "B I S S c"], layout_BI4: Int32[Array, "B I 4"]) -> Array:
        x_BND = super().enter(pixels_BISSc, layout_BI4)
        return (x_BND.astype(jnp.float32) + self.positions(layout_BI4)).astype(x_BND.dtype)

    def positions(self, layout_BI4: Int32[Array, "B I 4"]) -> Float[Array, "B N D"]:
        """The table's row at each patch, in fp32: between its four neighbours, in proportion."""
        side, merge = self.config.position_grid, self.config.merge
        sizes_BN2 = jnp.repeat(frame_sizes(layout_BI4) * merge, merge**2, axis=1)
        at_BN2 = self.places(layout_BI4[..., 2:]) * jnp.float32(side - 1) / jnp.maximum(sizes_BN2 - 1, 1)
        low_BN2 = jnp.clip(jnp.floor(at_BN2).astype(jnp.int32), 0, side - 2)
        part_BN2 = at_BN2 - low_BN2
        found_BND = jnp.zeros((), jnp.float32)
        for down in (0, 1):
            for right in (0, 1):
                row_BN, col_BN = low_BN2[..., 0] + down, low_BN2[..., 1] + right
                weight_BN = jnp.abs(1 - down - part_BN2[..., 0]) * jnp.abs(1 - right - part_BN2[..., 1])
                rows_BND = look_up(self.position_embedding[...], row_BN * side + col_BN, jnp.float32, "positions")
                found_BND += weight_BN[..., None] * rows_BND
        return found_BND


def frame_sizes(layout_BI4: Int32[Array, "B I 4"]) -> Int32[Array, "B I 2"]:
    """Rows and columns of the frame that each tile is of: its last tile is the last one of both."""
    frames_BI = layout_BI4[..., 1]
    is_last_BI = jnp.pad(frames_BI[:, 1:] != frames_BI[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    index_I = jnp.arange(frames_BI.shape[1], dtype=jnp.int32)
    last_BI = jax.lax.cummin(jnp.where(is_last_BI, index_I, frames_BI.shape[1]), axis=1, reverse=True)
    return 1 + jnp.take_along_axis(layout_BI4[..., 2:], last_BI[..., None], axis=1)
