"""SigLIP (arXiv 2303.15343), the tower of LLaVA-Video: every frame of a video is a tile, one row of its batch."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.attention import AttentionConfig, full_attention, kernel_length
from vlmem_jax.nn.linear import Linear, param, spread
from vlmem_jax.nn.lora import Adapters, LayerAdapters, LinearMap, adapted
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.runtime.sharding import constrain
from vlmem_jax.types import FrameGeometry, TileShape

Pool = Literal["bilinear", "average", "max"]
Newline = Literal["grid", "frame", "none"]


@dataclasses.dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the tower, and what becomes of the features of a frame; image_size and patch_size in pixels."""

    width: int = 1152
    layers: int = 26
    """Layers that run: LLaVA-Video takes the output of the last but one of 27, without a norm."""
    heads: int = 16
    mlp_width: int = 4304
    image_size: int = 384
    patch_size: int = 14
    norm_eps: float = 1e-6
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Mean of each colour, as a fraction of 255."""
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pool: Pool = "bilinear"
    """How 2 x 2 features become one visual token: half-pixel interpolation (odd sides are rounded up), means or maxima
    (a last row and column that are left over are dropped)."""
    newline: Newline = "grid"
    """Where a learned token stands among those of a frame: behind each row, behind the frame, or nowhere."""
    kind: Literal["siglip"] = "siglip"

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if self.grid < 2:
            raise ValueError(
                f"image_size must hold at least 2 x 2 patches of patch_size {self.patch_size}, got {self.image_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of a frame; pixels beyond them are not seen."""
        return self.image_size // self.patch_size

    @property
    def side(self) -> int:
        """Visual tokens along a side of a frame, without newlines."""
        return -(-self.grid // 2) if self.pool == "bilinear" else self.grid // 2

    @property
    def geometry(self) -> FrameGeometry:
        """What making tiles of frames needs to know."""
        return FrameGeometry(self.image_size, self.tile.tokens)

    @property
    def tile(self) -> TileShape:
        extra = {"grid": self.side, "frame": 1, "none": 0}[self.newline]
        return TileShape(side=self.image_size, channels=3, tokens=self.side**2 + extra)

    def channels(self, colours: tuple[float, float, float]) -> tuple[float, ...]:
        """A number of each colour as one of each channel of a tile."""
        return colours

    @property
    def linear_maps(self) -> dict[str, LinearMap]:
        """The maps of a layer by the name that adapters have for them."""
        embed, heads, mlp = ("embed", self.width), ("heads", self.width), ("mlp", self.mlp_width)
        maps = {name: LinearMap(f"attn/{name}", embed, heads) for name in "qkv"}
        maps["proj"] = LinearMap("attn/proj", heads, embed)
        return maps | {"fc1": LinearMap("mlp/fc1", embed, mlp), "fc2": LinearMap("mlp/fc2", mlp, embed)}

    @property
    def flops(self) -> tuple[int, int]:
        """Forward FLOPs of a frame: in weights, and in attention."""
        patches = self.grid**2
        weights = 2 * patches * 3 * self.patch_size**2 * self.width
        weights += self.layers * 2 * patches * self.width * (4 * self.width + 2 * self.mlp_width)
        return weights, self.layers * 4 * patches**2 * self.width

    def projector_flops(self, width: int) -> int:
        """Forward FLOPs of the projector to a decoder of this width, for a frame."""
        return 2 * self.grid**2 * (self.width * width + width * width)


class FrameAttention(nnx.Module):
    """Full attention among the patches of one frame."""

    def __init__(self, config: SigLIPConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        split = {"heads": config.heads, "head_dim": config.width // config.heads}
        self.q, self.k, self.v = (Linear({"embed": config.width}, split, bias=True, rngs=rngs) for _ in range(3))
        self.proj = Linear(split, {"embed": config.width}, bias=True, rngs=rngs)

    def __call__(
        self, x_ND: Float[Array, "N D"], padded: int, length: int, lora: LayerAdapters | None
    ) -> Float[Array, "N D"]:
        """The first `length` of each frame's `padded` patches are there; what comes out for others means nothing."""
        maps = {"q": self.q, "k": self.k, "v": self.v}
        q, k, v = (adapted(linear, name, x_ND, lora) for name, linear in maps.items())
        heads = self.q.bias.shape
        q_BTHC, k_BTHC, v_BTHC = (x.reshape(-1, padded, *heads) for x in (q, k, v))
        out_BTHC = full_attention(self.attention, q_BTHC, k_BTHC, v_BTHC, length)
        return adapted(self.proj, "proj", out_BTHC.reshape(-1, *heads), lora)


class SigLIPLayer(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: SigLIPConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (LayerNorm(config.width, config.norm_eps, rngs=rngs) for _ in range(2))
        self.attn = FrameAttention(config, attention, rngs=rngs)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.width, tanh=True, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], length: int, lora: LayerAdapters | None) -> Float[Array, "B T D"]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])  # as rows, the compiler lays them out as the attention kernel reads
        x_ND = constrain(x_ND + self.attn(self.norm1(x_ND), x_BTD.shape[1], length, lora), "parts", None)
        return constrain(x_ND + self.mlp(self.norm2(x_ND), lora), "parts", None).reshape(x_BTD.shape)


class SigLIP(nnx.Module):
    """Frames to patch features; no class token, and no norm after the last layer."""

    def __init__(self, config: SigLIPConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config, self.attention = config, attention
        p, width = config.patch_size, config.width
        init = nnx.initializers.normal(0.02)
        self.position_embedding = param(init, (config.grid**2, width), ("positions", "norm"), rngs)
        self.patch = Linear({"pixels": p, "pixels_x": p, "channels": 3}, {"embed": width}, bias=True, rngs=rngs)
        self.layers = stack(lambda rngs: SigLIPLayer(config, attention, rngs=rngs), config.layers, rngs)

    def embed(self, pixels_BSSc: Float[Array, "B S S 3"]) -> Float[Array, "B P D"]:
        """The patches, row by row, before the first layer."""
        B, grid, p = pixels_BSSc.shape[0], self.config.grid, self.config.patch_size
        seen = pixels_BSSc[:, : grid * p, : grid * p]
        patches = seen.reshape(B, grid, p, grid, p, 3).swapaxes(2, 3).reshape(B, grid * grid, p, p, 3)
        x_BPD = self.patch(patches)
        return x_BPD + spread(self.position_embedding[...], x_BPD.shape, x_BPD.dtype)

    def __call__(
        self,
        pixels_BSSc: Float[Array, "B S S 3"],
        *,
        drop_path_key: jax.Array | None = None,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> Float[Array, "B P D"]:
        """Features of the P patches, row by row. No paths are dropped."""
        x_BPD = self.embed(pixels_BSSc)
        P = x_BPD.shape[1]
        x_BTD = jnp.pad(x_BPD, ((0, 0), (0, kernel_length(self.attention, P) - P), (0, 0)))
        graph, layers = nnx.split(self.layers)
        adapters = (lora.weights, jnp.arange(self.config.layers)) if lora else None

        def body(x_BTD, layer):
            state, adapters = layer
            return nnx.merge(graph, state)(x_BTD, P, lora.layer(*adapters) if lora else None), None

        x_BTD = constrain(x_BTD, "parts", None, None)
        return jax.lax.scan(remat(body, remat_policy), x_BTD, (layers, adapters))[0][:, :P]
