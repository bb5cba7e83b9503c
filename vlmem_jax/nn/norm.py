"""Normalisations; statistics in fp32 whatever the dtype of x."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.nn.linear import ones, param, zeros


class RMSNorm(nnx.Module):
    """x / rms(x) times `scale`, in fp32, cast back to the dtype of x."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(ones, (width,), ("norm",), rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * `scale` + `bias`."""

    def __init__(self, width: int, eps: float, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(ones, (width,), ("norm",), rngs)
        self.bias = param(zeros, (width,), ("norm",), rngs)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)
