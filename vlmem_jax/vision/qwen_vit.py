"""The vision tower of Qwen2.5-VL (arXiv 2502.13923, sec. 2.1): images and videos of any size, packed on one axis.

Patches come in blocks of merge x merge that become one visual token each, and blocks come window after window. Most
layers attend within windows, a few within whole frames; segment ids say what belongs together, so that one program
serves all sizes.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.nn.attention import AttentionConfig, segment_attention, window_attention
from vlmem_jax.nn.linear import Linear
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import Rotation, frequencies, rotate, rotation
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.sharding import constrain
from vlmem_jax.types import PatchGeometry, TileShape


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

    def channels(self, colours: tuple[float, float, float]) -> tuple[float, ...]:
        """A number of each colour as one of each value of a patch."""
        return tuple(np.repeat(colours, self.patch_frames * self.patch_size**2).tolist())


class Segments(NamedTuple):
    """Which patches see each other: equal ids; 0 is padding."""

    windows_BN: Int32[Array, "B N"]
    frames_BN: Int32[Array, "B N"]


class WindowedAttention(nnx.Module):
    """Attention with rotary positions among the patches of a frame, if `full`, or else of a window."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        self.longest = (config.geometry.window * config.merge) ** 2
        split = {"heads": config.heads, "head_dim": config.width // config.heads}
        self.qkv = Linear({"embed": config.width}, {"qkv": 3, **split}, bias=True, rngs=rngs)
        self.proj = Linear(split, {"embed": config.width}, bias=True, rngs=rngs)

    def __call__(
        self, x_BND: Float[Array, "B N D"], tables: Rotation, segments: Segments, full: Bool[Array, ""]
    ) -> Float[Array, "B N D"]:
        heads = self.qkv.bias.shape[1:]
        q_BNHC, k_BNHC, v_BNHC = (self.qkv.part(x_BND, n).reshape(*x_BND.shape[:2], *heads) for n in range(3))
        out_BNHC = jax.lax.cond(
            full,
            lambda *qkv: segment_attention(self.attention, *qkv, segments.frames_BN),
            lambda *qkv: window_attention(self.attention, *qkv, segments.windows_BN, self.longest),
            rotate(q_BNHC, tables), rotate(k_BNHC, tables), v_BNHC,
        )  # fmt: skip
        return self.proj(out_BNHC)


class QwenViTLayer(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.norm2 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = WindowedAttention(config, attention, rngs=rngs)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True, rngs=rngs)

    def __call__(
        self, x_BND: Float[Array, "B N D"], tables: Rotation, segments: Segments, full: Bool[Array, ""]
    ) -> Float[Array, "B N D"]:
        x_BND = constrain(x_BND + self.attn(self.norm1(x_BND), tables, segments, full), "batch", "tokens", None)
        return constrain(x_BND + self.mlp(self.norm2(x_BND)), "batch", "tokens", None)


class QwenViT(nnx.Module):
    """Blocks of patches to patch features; no norm after the last layer."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        p = config.patch_size
        values = {"channels": 3, "frames": config.patch_frames, "pixels": p, "pixels_x": p}
        self.patch = Linear(values, {"embed": config.width}, rngs=rngs)
        self.layers = stack(lambda rngs: QwenViTLayer(config, attention, rngs=rngs), config.layers, rngs)

    def __call__(
        self, pixels_BISSc: Float[Array, "B I S S c"], layout_BI4: Int32[Array, "B I 4"], *, remat_policy: str = "none"
    ) -> Float[Array, "B N D"]:
        """Features of the N = I * S * S patches, block after block; `layout_BI4` is that of `types.Batch`."""
        c = self.config
        B, I, S = pixels_BISSc.shape[:3]
        x_BND = self.patch(pixels_BISSc.reshape(B, I * S * S, 3, c.patch_frames, c.patch_size, c.patch_size))
        x_BND = constrain(x_BND, "batch", "tokens", None)
        segments = Segments(*(jnp.repeat(layout_BI4[..., n], S * S, axis=1) for n in range(2)))
        tables = self._rotation(layout_BI4[..., 2:])
        is_full_L = np.isin(np.arange(c.layers), c.full_layers)
        graph, layers = nnx.split(self.layers)

        def body(x_BND, layer):
            state, full = layer
            return nnx.merge(graph, state)(x_BND, tables, segments, full), None

        return jax.lax.scan(remat(body, remat_policy), x_BND, (layers, is_full_L))[0]

    def _rotation(self, places_BI2: Int32[Array, "B I 2"]) -> Rotation:
        """Half of the pairs turn by the patch's row in its image, half by its column, at equal frequencies."""
        c = self.config
        within_PA = np.indices((c.merge, c.merge), dtype=np.int32).reshape(2, -1).T
        places_BN2 = (places_BI2[:, :, None] * c.merge + within_PA).reshape(places_BI2.shape[0], -1, 2)
        quarter = c.width // c.heads // 4
        frequencies_R = jnp.tile(frequencies(2 * quarter, c.rope_theta), 2)
        return rotation(places_BN2, frequencies_R, (quarter, quarter))
