"""InternViT, the vision tower of the InternVL family (arXiv 2404.16821): every tile is one row of its batch."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.attention import AttentionConfig, full_attention, kernel_length
from vlmem_jax.nn.linear import Linear, param, spread, zeros
from vlmem_jax.nn.lora import Adapters, LayerAdapters, LinearMap, adapted, adapted_part
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm, RMSNorm
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.runtime.sharding import constrain
from vlmem_jax.types import TileGeometry, TileShape


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; image_size and patch_size in pixels."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    image_size: int = 448
    patch_size: int = 14
    position_grid: int = 0
    """Patches along a side of the stored position table; 0: image_size / patch_size, no resampling."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """RMSNorm over all heads of q and of k together."""
    layer_scale_init: float = 1.0
    drop_path: float = 0.0
    """Stochastic depth of the last layer while training; earlier layers less, linearly from 0."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each colour, as a fraction of 255."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    select_layer: int = -1
    """Which hidden state is the output: -1 the last layer's, 0 the embeddings."""
    kind: Literal["intern_vit"] = "intern_vit"

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        if self.grid % 2:
            raise ValueError(f"image_size / patch_size must be even for pixel shuffle, got {self.grid}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads {self.heads}, got {self.width}")
        if not -self.layers - 1 <= self.select_layer <= self.layers:
            raise ValueError(f"select_layer must name one of {self.layers + 1} hidden states, got {self.select_layer}")

    @property
    def grid(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def side(self) -> int:
        """Visual tokens along a side of a tile."""
        return self.grid // 2

    @property
    def geometry(self) -> TileGeometry:
        """What cutting images into tiles needs to know."""
        return TileGeometry(self.image_size, self.grid // 2)

    @property
    def tile(self) -> TileShape:
        return TileShape(side=self.image_size, channels=3, tokens=(self.grid // 2) ** 2)

    def channels(self, colours: tuple[float, float, float]) -> tuple[float, ...]:
        """A number of each colour as one of each channel of a tile."""
        return colours

    @property
    def linear_maps(self) -> dict[str, LinearMap]:
        """The maps of a layer by the name that adapters have for them."""
        embed, heads, mlp = ("embed", self.width), ("heads", self.width), ("mlp", self.mlp_width)
        maps = {name: LinearMap("attn/qkv", embed, heads, n) for n, name in enumerate("qkv")}
        maps["proj"] = LinearMap("attn/proj", heads, embed)
        return maps | {"fc1": LinearMap("mlp/fc1", embed, mlp), "fc2": LinearMap("mlp/fc2", mlp, embed)}

    @property
    def flops(self) -> tuple[int, int]:
        """Forward FLOPs of a tile: in weights, and in attention."""
        patches, queries = self.grid**2, self.grid**2 + 1
        weights = 2 * patches * 3 * self.patch_size**2 * self.width
        weights += self.layers_used * 2 * queries * self.width * (4 * self.width + 2 * self.mlp_width)
        return weights, self.layers_used * 4 * queries**2 * self.width

    def projector_flops(self, width: int) -> int:
        """Forward FLOPs of the projector to a decoder of this width, for a tile."""
        return 2 * self.tile.tokens * (4 * self.width * width + width * width)

    @property
    def layers_used(self) -> int:
        """Layers that run before the selected hidden state."""
        return self.select_layer if self.select_layer >= 0 else self.layers + 1 + self.select_layer


def _norm(config: VisionConfig, rngs: nnx.Rngs) -> LayerNorm | RMSNorm:
    cls = LayerNorm if config.norm == "layer_norm" else RMSNorm
    return cls(config.width, config.norm_eps, rngs=rngs)


class VisionAttention(nnx.Module):
    """Full attention among the patches of one tile."""

    def __init__(self, config: VisionConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        width, heads = config.width, config.heads
        split = {"heads": heads, "head_dim": width // heads}
        self.qkv = Linear({"embed": width}, {"qkv": 3, **split}, bias=True, rngs=rngs)
        self.proj = Linear(split, {"embed": width}, bias=True, rngs=rngs)
        self.q_norm = RMSNorm(width, config.norm_eps, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(width, config.norm_eps, rngs=rngs) if config.qk_norm else None

    def __call__(
        self, x_ND: Float[Array, "N D"], padded: int, length: int, lora: LayerAdapters | None
    ) -> Float[Array, "N D"]:
        """The first `length` of each tile's `padded` tokens are there; what comes out for others means nothing."""
        q_ND, k_ND, v_ND = (adapted_part(self.qkv, n, name, x_ND, lora) for n, name in enumerate("qkv"))
        if self.q_norm is not None and self.k_norm is not None:
            q_ND, k_ND = self.q_norm(q_ND), self.k_norm(k_ND)
        heads = self.qkv.bias.shape[1:]
        q_BTHC, k_BTHC, v_BTHC = (x_ND.reshape(-1, padded, *heads) for x_ND in (q_ND, k_ND, v_ND))
        out_BTHC = full_attention(self.attention, q_BTHC, k_BTHC, v_BTHC, length)
        return adapted(self.proj, "proj", out_BTHC.reshape(-1, *heads), lora)


class VisionLayer(nnx.Module):
    """Pre-norm attention and MLP, each scaled per channel and dropped per tile with probability `drop`."""

    def __init__(self, config: VisionConfig, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = _norm(config, rngs), _norm(config, rngs)
        self.attn = VisionAttention(config, attention, rngs=rngs)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.width, rngs=rngs)

        def scale(key, shape, dtype):
            return zeros(key, shape, dtype) + config.layer_scale_init

        self.ls1 = param(scale, (config.width,), ("norm",), rngs)
        self.ls2 = param(scale, (config.width,), ("norm",), rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        keep_2B: Float[Array, "2 B"] | None,
        length: int,
        lora: LayerAdapters | None,
    ) -> Float[Array, "B T D"]:
        T, dtype = x_BTD.shape[1], x_BTD.dtype
        # as rows, the compiler lays them out as the attention kernel reads them
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        attn = functools.partial(self.attn, padded=T, length=length, lora=lora)
        mlp = functools.partial(self.mlp, lora=lora)
        for n, (scale, norm, block) in enumerate(((self.ls1, self.norm1, attn), (self.ls2, self.norm2, mlp))):
            residual = (scale[...] * block(norm(x_ND)).astype(jnp.float32)).astype(dtype)
            x_ND += residual if keep_2B is None else residual * jnp.repeat(keep_2B[n], T)[:, None].astype(dtype)
            x_ND = constrain(x_ND, "parts", None)
        return x_ND.reshape(x_BTD.shape)


class InternViT(nnx.Module):
    """Tiles to patch features; no norm after the last layer."""

    def __init__(self, config: VisionConfig, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs):
        self.config, self.attention = config, attention
        p, width = config.patch_size, config.width
        self.class_embedding = param(nnx.initializers.normal(1.0), (width,), ("norm",), rngs)
        stored = config.position_grid or config.grid
        init = nnx.initializers.normal(0.02)
        self.position_embedding = param(init, (1 + stored**2, width), ("positions", "norm"), rngs)
        self.patch = Linear({"pixels": p, "pixels_x": p, "channels": 3}, {"embed": width}, bias=True, rngs=rngs)
        self.layers = stack(lambda rngs: VisionLayer(config, attention, rngs=rngs), config.layers, rngs)

    def __call__(
        self,
        pixels_BSSc: Float[Array, "B S S 3"],
        *,
        drop_path_key: jax.Array | None = None,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> Float[Array, "B P D"]:
        """Features of the P = (S / patch_size)^2 patches, row by row. With a key, drops paths as in training."""
        return self.hidden(pixels_BSSc, drop_path_key=drop_path_key, lora=lora, remat_policy=remat_policy)[:, 1:]

    def hidden(
        self,
        pixels_BSSc: Float[Array, "B S S 3"],
        *,
        drop_path_key: jax.Array | None = None,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> Float[Array, "B Q D"]:
        """The selected hidden state, class token first."""
        config, dtype = self.config, pixels_BSSc.dtype
        B, grid, p = pixels_BSSc.shape[0], config.grid, config.patch_size
        patches = pixels_BSSc.reshape(B, grid, p, grid, p, 3).swapaxes(2, 3).reshape(B, grid * grid, p, p, 3)
        class_token = spread(self.class_embedding[...], (B, 1, config.width), dtype)
        x_BTD = jnp.concatenate([class_token, self.patch(patches)], axis=1)
        x_BTD += spread(resample_positions(self.position_embedding[...], grid), x_BTD.shape, dtype)
        Q = x_BTD.shape[1]
        x_BTD = jnp.pad(x_BTD, ((0, 0), (0, self._padded(Q) - Q), (0, 0)))
        x_BTD = constrain(x_BTD, "parts", None, None)

        graph, layers = nnx.split(self.layers)
        adapters = (lora.weights, jnp.arange(config.layers)) if lora else None
        layers, adapters = jax.tree.map(lambda leaf: leaf[: config.layers_used], (layers, adapters))
        keep_L2B = None
        if drop_path_key is not None and config.drop_path > 0:
            rates_L = jnp.linspace(0.0, config.drop_path, config.layers)[: config.layers_used]
            kept = jax.random.bernoulli(drop_path_key, 1 - rates_L[:, None, None], (config.layers_used, 2, B))
            keep_L2B = kept / (1 - rates_L[:, None, None])

        def body(x_BTD, layer):
            state, keep_2B, adapters = layer
            return nnx.merge(graph, state)(x_BTD, keep_2B, Q, lora.layer(*adapters) if lora else None), None

        return jax.lax.scan(remat(body, remat_policy), x_BTD, (layers, keep_L2B, adapters))[0][:, :Q]

    def _padded(self, length: int) -> int:
        """Tokens of a tile with those that the attention kernel wants beside them."""
        return kernel_length(self.attention, length)


def resample_positions(table_PD: Float[Array, "P D"], grid: int) -> Float[Array, "Q D"]:
    """Position table (class token first) for `grid` patches a side, resized bicubically in fp32 where it has others."""
    stored = round((table_PD.shape[0] - 1) ** 0.5)
    if stored == grid:
        return table_PD
    weights = jnp.asarray(_bicubic_matrix(stored, grid), jnp.float32)
    square = table_PD[1:].astype(jnp.float32).reshape(stored, stored, -1)
    resized = jnp.einsum("as,bt,std->abd", weights, weights, square).reshape(grid * grid, -1)
    return jnp.concatenate([table_PD[:1], resized.astype(table_PD.dtype)])


def _bicubic_matrix(source: int, target: int) -> np.ndarray:
    """[target, source] weights of bicubic interpolation, a = -0.75, half-pixel centres, edges repeated.

    jax.image.resize has a = -0.5; published checkpoints were made with PyTorch's -0.75.
    """
    a = -0.75
    centres = (np.arange(target) + 0.5) * source / target - 0.5
    matrix = np.zeros((target, source))
    for tap in range(-1, 3):
        index = np.floor(centres).astype(int) + tap
        x = np.abs(centres - index)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        np.add.at(matrix, (np.arange(target), index.clip(0, source - 1)), np.where(x <= 1, near, far))
    return matrix
