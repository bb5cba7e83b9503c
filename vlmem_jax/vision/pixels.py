"""Pixels cross to the device as bytes; the one place that turns them into what a tower takes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def normalise(
    pixels: UInt8[Array | np.ndarray, "... c"], mean: tuple[float, ...], std: tuple[float, ...], dtype
) -> Float[Array, "... c"]:
    """(pixels / 255 - mean) / std per channel, computed in fp32."""
    scaled = pixels.astype(jnp.float32) / 255.0
    return ((scaled - jnp.array(mean)) / jnp.array(std)).astype(dtype)
