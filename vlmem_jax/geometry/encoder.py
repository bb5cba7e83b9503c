"""DINOv2 with registers (arXiv 2304.07193, 2309.16588), the encoder of models of geometry."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from vlmem_jax.geometry.blocks import Block, BlockConfig, through
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import stack
from vlmem_jax.vision import normalise

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes; `grid`: patches along a side of the stored position table, patch_size in pixels."""

    block: BlockConfig
    layers: int
    grid: int
    registers: int
    patch_size: int = 14


class Encoder(nnx.Module):
    """Views to a token for each patch, row by row; those of class and registers stay inside."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        p, width = config.patch_size, config.block.width
        normal = nnx.initializers.normal(0.02)
        self.patch = Linear({"pixels": p, "pixels_x": p, "channels": 3}, {"embed": width}, bias=True, rngs=rngs)
        self.class_token = param(normal, (width,), ("norm",), rngs)
        self.positions = param(normal, (1 + config.grid**2, width), ("positions", "norm"), rngs)
        self.registers = param(normal, (config.registers, width), ("positions", "norm"), rngs)
        self.layers = stack(lambda rngs: Block(config.block, rngs=rngs), config.layers, rngs)
        self.norm = LayerNorm(width, config.block.norm_eps, rngs=rngs)

    def __call__(self, images_NHWc: Float[Array, "N H W 3"]) -> Float[Array, "N P D"]:
        """fp32; images are normalised already, and their sides are multiples of a patch."""
        N, H, W, _ = images_NHWc.shape
        p, width = self.config.patch_size, self.config.block.width
        patches = images_NHWc.reshape(N, H // p, p, W // p, p, 3).swapaxes(2, 3).reshape(N, -1, p, p, 3)
        x_NPD = self.patch(patches.astype(self.config.block.dtype)).astype(jnp.float32)
        first, grid = jnp.split(resized_positions(self.positions[...], H // p, W // p), [1])
        special = jnp.concatenate([self.class_token[...] + first, self.registers[...]])
        special = jnp.broadcast_to(special, (N, *special.shape))
        x_NTD = through(self.layers, jnp.concatenate([special, x_NPD + grid], axis=1))
        return self.norm(x_NTD)[:, special.shape[1] :].reshape(N, -1, width)


def resized_positions(table_PD: Float[Array, "P D"], rows: int, columns: int) -> Float[Array, "Q D"]:
    """The table, class token first, for so many patches: resized bicubically (a = -0.5) with anti-aliasing, in fp32."""
    side = round((table_PD.shape[0] - 1) ** 0.5)
    square = table_PD[1:].astype(jnp.float32).reshape(side, side, -1)
    resized = jax.image.resize(square, (rows, columns, square.shape[-1]), "cubic", antialias=True)
    return jnp.concatenate([table_PD[:1], resized.reshape(rows * columns, -1)])


def normalised(images_NHWc: UInt8[Array, "N H W 3"] | Float[Array, "N H W 3"]) -> Float[Array, "N H W 3"]:
    """Bytes, or numbers from 0 to 1, as the encoder takes them, in fp32."""
    if images_NHWc.dtype == jnp.uint8:
        return normalise(images_NHWc, PIXEL_MEAN, PIXEL_STD, jnp.float32)
    return (images_NHWc.astype(jnp.float32) - jnp.array(PIXEL_MEAN)) / jnp.array(PIXEL_STD)
