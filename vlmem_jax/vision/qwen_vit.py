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

from vlmem_jax.nn.attention import AttentionConfig, attend, segment_attention, window_attention
from vlmem_jax.nn.linear import Linear
from vlmem_jax.nn.lora import Adapters, LayerAdapters, LinearMap, adapted, adapted_part
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import Rotation, frequencies, rotate, rotation
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.runtime.sharding import constrain
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


class Segments(NamedTuple):
    """Which patches see each other: equal ids; 0 is padding."""

    windows_BN: Int32[Array, "B N"]
    frames_BN: Int32[Array, "B N"]


class WindowedAttention(nnx.Module):
    """Attention with rotary positions among the patches of a frame, if `full`, or else of a window.

    Rows beside the patches see those that they may, in whichever window, in every layer.
    """

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        self.longest = (config.geometry.window * config.merge) ** 2
        split = {"heads": config.heads, "head_dim": config.width // config.heads}
        self.qkv = Linear({"embed": config.width}, {"qkv": 3, **split}, bias=True, rngs=rngs)
        self.proj = Linear(split, {"embed": config.width}, bias=True, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        tables: Rotation,
        segments: Segments,
        full: Bool[Array, ""],
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: LayerAdapters | None = None,
    ) -> Float[Array, "B S D"]:
        """`allowed_BES`: what the E rows see that stand behind the N patches, which do not see them; S = N + E."""
        heads = *x_BSD.shape[:2], *self.qkv.bias.shape[1:]
        parts = (adapted_part(self.qkv, n, name, x_BSD, lora) for n, name in enumerate("qkv"))
        q_BSHC, k_BSHC, v_BSHC = (part.reshape(heads) for part in parts)
        q_BSHC, k_BSHC = rotate(q_BSHC, tables), rotate(k_BSHC, tables)
        N = segments.windows_BN.shape[1]
        out_BSHC = jax.lax.cond(
            full,
            lambda *qkv: segment_attention(self.attention, *qkv, segments.frames_BN),
            lambda *qkv: window_attention(self.attention, *qkv, segments.windows_BN, self.longest),
            *(x if allowed_BES is None else x[:, :N] for x in (q_BSHC, k_BSHC, v_BSHC)),
        )
        if allowed_BES is not None:
            out_BEHC = attend(q_BSHC[:, N:], k_BSHC, v_BSHC, allowed_BES)
            out_BSHC = jnp.concatenate([out_BSHC, out_BEHC], axis=1)
        return adapted(self.proj, "proj", out_BSHC, lora)


class QwenViTLayer(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.norm2 = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = WindowedAttention(config, attention, rngs=rngs)
        self.mlp = GatedMLP(config.width, config.mlp_width, bias=True, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        tables: Rotation,
        segments: Segments,
        full: Bool[Array, ""],
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: LayerAdapters | None = None,
    ) -> Float[Array, "B S D"]:
        attended_BSD = self.attn(self.norm1(x_BSD), tables, segments, full, allowed_BES, lora)
        x_BSD = constrain(x_BSD + attended_BSD, "batch", "tokens", None)
        return constrain(x_BSD + self.mlp(self.norm2(x_BSD), lora), "batch", "tokens", None)


class QwenViT(nnx.Module):
    """Blocks of patches to patch features; no norm after the last layer."""

    def __init__(self, config: QwenViTConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config = config
        p = config.patch_size
        values = {"channels": 3, "frames": config.patch_frames, "pixels": p, "pixels_x": p}
        self.patch = Linear(values, {"embed": config.width}, rngs=rngs)
        self.layers = stack(lambda rngs: QwenViTLayer(config, attention, rngs=rngs), config.layers, rngs)

    def __call__(
        self,
        pixels_BISSc: Float[Array, "B I S S c"],
        layout_BI4: Int32[Array, "B I 4"],
        *,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> Float[Array, "B N D"]:
        """Features of the N = I * S * S patches, block after block; `layout_BI4` is that of `types.Views`."""
        numbers = range(self.config.layers)
        return self._through(self._enter(pixels_BISSc), layout_BI4, numbers, remat_policy, lora=lora)

    def keeping(
        self,
        pixels_BISSc: Float[Array, "B I S S c"],
        layout_BI4: Int32[Array, "B I 4"],
        first: int,
        remat_policy: str,
        lora: Adapters | None = None,
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
        """The features, and what they were before layer `first`, for `beside`."""
        kept_BND = self._through(self._enter(pixels_BISSc), layout_BI4, range(first), remat_policy, lora=lora)
        numbers = range(first, self.config.layers)
        return self._through(kept_BND, layout_BI4, numbers, remat_policy, lora=lora), kept_BND

    def beside(
        self,
        kept_BND: Float[Array, "B N D"],
        layout_BI4: Int32[Array, "B I 4"],
        rows_BED: Float[Array, "B E D"],
        allowed_BES: Bool[Array, "B E S"],
        lora: Adapters,
        first: int,
        remat_policy: str,
    ) -> Float[Array, "B E D"]:
        """What rows behind the patches become in the layers from `first` on, of which alone are the adapters.

        In every layer they see those of the S = N + E patches and rows that they may, and patches do not see them; they
        are not turned, as if at row and column 0.
        """
        x_BSD = jnp.concatenate([kept_BND, rows_BED.astype(kept_BND.dtype)], axis=1)
        layers = range(first, self.config.layers)
        return self._through(x_BSD, layout_BI4, layers, remat_policy, allowed_BES, lora)[:, kept_BND.shape[1] :]

    def _enter(self, pixels_BISSc: Float[Array, "B I S S c"]) -> Float[Array, "B N D"]:
        c, (B, I, S) = self.config, pixels_BISSc.shape[:3]
        x_BND = self.patch(pixels_BISSc.reshape(B, I * S * S, 3, c.patch_frames, c.patch_size, c.patch_size))
        return constrain(x_BND, "batch", "tokens", None)

    def _through(
        self,
        x_BSD: Float[Array, "B S D"],
        layout_BI4: Int32[Array, "B I 4"],
        numbers: range,
        remat_policy: str,
        allowed_BES: Bool[Array, "B E S"] | None = None,
        lora: Adapters | None = None,
    ) -> Float[Array, "B S D"]:
        """What comes out of the layers of these numbers."""
        c = self.config
        segments = Segments(*(jnp.repeat(layout_BI4[..., n], c.merge**2, axis=1) for n in range(2)))
        tables = self._rotation(layout_BI4[..., 2:])
        if allowed_BES is not None:
            behind = (0, 0), (0, allowed_BES.shape[1]), (0, 0)
            tables = tuple(jnp.pad(x, behind, constant_values=still) for x, still in zip(tables, (1, 0), strict=True))
        is_full_L = np.isin(numbers, c.full_layers)
        graph, layers = nnx.split(self.layers)
        adapters, start = None, numbers.start if allowed_BES is None else 0
        if lora:
            adapters = lora.weights, jnp.arange(c.layers)
            adapters = jax.tree.map(lambda leaf: leaf[start : start + len(numbers)], adapters)
        if len(numbers) < c.layers:
            layers = jax.tree.map(lambda leaf: leaf[numbers.start : numbers.stop], layers)

        def body(x_BSD, layer):
            state, full, adapters = layer
            own = lora.layer(*adapters) if lora else None
            return nnx.merge(graph, state)(x_BSD, tables, segments, full, allowed_BES, own), None

        return jax.lax.scan(remat(body, remat_policy), x_BSD, (layers, is_full_L, adapters))[0]

    def _rotation(self, places_BI2: Int32[Array, "B I 2"]) -> Rotation:
        """Half of the pairs turn by the patch's row in its image, half by its column, at equal frequencies."""
        c = self.config
        within_PA = np.indices((c.merge, c.merge), dtype=np.int32).reshape(2, -1).T
        places_BN2 = (places_BI2[:, :, None] * c.merge + within_PA).reshape(places_BI2.shape[0], -1, 2)
        quarter = c.width // c.heads // 4
        frequencies_R = jnp.tile(frequencies(2 * quarter, c.rope_theta), 2)
        return rotation(places_BN2, frequencies_R, (0,) * quarter + (1,) * quarter)
