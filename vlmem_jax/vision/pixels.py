"""Pixels cross to the device as bytes; the one place that turns them into what a tower takes."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(
    pixels: UInt8[Array, "... c"], dtype, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Float[Array, "... c"]:
    """(pixels / 255 - mean) / std per channel, computed in fp32."""
    scaled = pixels.astype(jnp.float32) / 255.0
    return ((scaled - jnp.array(mean)) / jnp.array(std)).astype(dtype)
