"""The vision tower of Qwen2.5-VL (arXiv 2502.13923, sec. 2.1): images and videos of any size, packed on one axis.

Blocks of patches come window after window. Most layers attend within windows, a few within whole frames.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool

from vlmem_jax.nn.attention import AttentionConfig, segment_attention, window_attention
from vlmem_jax.nn.linear import Linear
from vlmem_jax.nn.lora import LinearMap
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.stack import stack
from vlmem_jax.types import PatchGeometry, TileShape
from vlmem_jax.vision.patch_tower import PatchAttention, PatchLayer, PatchTower, Segments


@dataclasses.dataclass(frozen=True)
class QwenViTConfig:
    """Sizes of the tower; patch_size and window in pixels."""

    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 3420
    patch_size: int = 14
    patch_frames: int = 2
    """Frames of a video that a patch spans; an image fills them with copies."""
    merge: int = 2
    """Patches along a side of the block that becomes one visual token."""
    window: int = 112
    """Side of a window; what is more than whole blocks is left out."""
    full_layers: tuple[int, ...] = (7, 15, 23, 31)
    """Layers that attend within frames; the others within windows."""
    tokens_per_second: float = 2.0
    """Rotary positions of the decoder that a second of video takes."""
    rope_theta: float = 1e4
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of each colour, as a fraction of 255."""
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    kind: Literal["qwen_vit"] = "qwen_vit"

    def __post_init__(self):
        if self.width % (4 * self.heads):
            raise ValueError(f"width must be a multiple of 4 * heads {self.heads}, got {self.width}")
        if self.window < self.patch_size * self.merge:
            raise ValueError(
                f"window must be at least patch_size * merge {self.patch_size * self.merge}, got {self.window}"
            )
        if not all(0 <= layer < self.layers for layer in self.full_layers):
            raise ValueError(f"full_layers must name layers 0 to {self.layers - 1}, got {self.full_layers}")

    @property
    def geometry(self) -> PatchGeometry:
        """What cutting images into patches needs to know."""
        blocks = self.window // (self.patch_size * self.merge)
        return PatchGeometry(self.patch_size, self.patch_frames, self.merge, blocks, self.tokens_per_second)

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
        maps |= {"proj": LinearMap("attn/proj", heads, embed), "down": LinearMap("mlp/down", mlp, embed)}
        return maps | {name: LinearMap(f"mlp/{name}", embed, mlp) for name in ("gate", "up")}

    @property
    def flops(self) -> tuple[int, int]:
        """Forward FLOPs of a tile: in weights, and in attention. Layers that attend within frames count as those within
        windows, since it depends on the images how large frames are."""
        patches, near = self.merge**2, (self.geometry.window * self.merge) ** 2
        weights = patches * self.width * (self.tile.channels + self.layers * (4 * self.width + 3 * self.mlp_width))
        return 2 * weights, self.layers * 4 * patches * near * self.width

    def projector_flops(self, width: int) -> int:
        """Forward FLOPs of the merger to a decoder of this width, for a tile."""
        inner = self.merge**2 * self.width
        return 2 * (inner * inner + inner * width)

    def channels(self, colours: tuple[float, float, float]) -> tuple[float, ...]:
        """A number of each colour as one of each value of a patch."""
        return tuple(np.repeat(colours, self.patch_frames * self.patch_size**2).tolist())


class WindowedAttention(PatchAttention):
    """Attention among the patches of a frame, if `full`, or else of a window."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, attention, rngs=rngs)
        self.longest = (config.geometry.window * config.merge) ** 2

    def among(self, qkv: tuple[Array, ...], segments: Segments, full: Bool[Array, ""] | None) -> Array:
        return jax.lax.cond(
            full,
            lambda *qkv: segment_attention(self.attention, *qkv, segments.frames_BN),
            lambda *qkv: window_attention(self.attention, *qkv, segments.windows_BN, self.longest),
            *qkv,
        )


class QwenViTLayer(PatchLayer):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.norm2 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = WindowedAttention(config, attention, rngs=rngs)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True, rngs=rngs)


class QwenViT(PatchTower):
    """Blocks of patches to patch features; no norm after the last layer."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        p = config.patch_size
        values = {"channels": 3, "frames": config.patch_frames, "pixels": p, "pixels_x": p}
        self.patch = Linear(values, {"embed": config.width}, rngs=rngs)
        self.layers = stack(lambda rngs: QwenViTLayer(config, attention, rngs=rngs), config.layers, rngs)

    def varying(self, numbers: range) -> np.ndarray:
        return np.isin(numbers, self.config.full_layers)
