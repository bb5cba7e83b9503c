"""Frames that know their place (VLM^2 sec. 3.2, eq. 1-4): each patch gets its point in space, and reads the geometry of
its frame, which knows from where it was seen."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlmem_jax.memory.vlm2.config import VLM2Config
from vlmem_jax.nn.attention import attend
from vlmem_jax.nn.linear import Linear
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.types import Geometry

GATE_START = -2.0
"""Of the injection: a token begins with an eighth of its place."""


class Fusion(nnx.Module):
    """Patches read the geometry of their frame."""

    def __init__(self, config: VLM2Config, width: int, *, rngs: nnx.Rngs):
        heads, source = split_heads(config, width), config.geometry_width
        self.ln_q, self.ln_kv = (LayerNorm(size, config.norm_eps, rngs=rngs) for size in (width, source))
        self.q = Linear({"embed": width}, heads, bias=True, rngs=rngs)
        self.k, self.v = (Linear({"embed": source}, heads, bias=True, rngs=rngs) for _ in range(2))
        self.o = zero_started(Linear(heads, {"embed": width}, bias=True, rngs=rngs))

    def __call__(self, x_BND: Float[Array, "B N D"], geometry_BMG: Float[Array, "B M G"]) -> Float[Array, "B N D"]:
        source = self.ln_kv(geometry_BMG)
        return self.o(attend(self.q(self.ln_q(x_BND)), self.k(source), self.v(source), None))


class Representation(nnx.Module):
    """The 3D-aware representation of frames, each on its own. It starts as the frames that come in."""

    def __init__(self, config: VLM2Config, width: int, *, rngs: nnx.Rngs):
        self.config = config
        geometry, views = config.geometry_width, config.view_width
        self.phi = GeluMLP(3, config.place_width or width, width, rngs=rngs)
        zero_started(self.phi.fc2)
        self.gate = GeluMLP(2 * width, config.gate_width or width, 1, rngs=rngs)
        self.gate.fc2.bias[...] += GATE_START
        self.psi_v, self.psi_g = (Linear({"embed": views}, {"mlp": geometry}, bias=True, rngs=rngs) for _ in range(2))
        self.va = GeluMLP(2 * geometry, config.align_width or geometry, geometry, rngs=rngs)
        self.fusion = Fusion(config, width, rngs=rngs)

    def __call__(self, x_BND: Float[Array, "B N D"], geometry: Geometry) -> Float[Array, "B N D"]:
        """H of frames whose patches are x, with the geometry of each."""
        tokens_BNG, views_BNV = (x.astype(x_BND.dtype) for x in (geometry.tokens_BNG, geometry.views_BNV))
        placed_BND = self.inject(x_BND, geometry.coords_BN3)
        read_BND = self.fusion(placed_BND, self.align(tokens_BNG, views_BNV))
        return placed_BND + read_BND if self.config.fusion_residual else read_BND

    def inject(self, x_BND: Float[Array, "B N D"], coords_BN3: Float[Array, "B N 3"]) -> Float[Array, "B N D"]:
        """F^pa: patches with the place of each (eq. 1)."""
        place_BND = self.phi(coords_BN3.astype(x_BND.dtype))
        if self.config.injection == "off":
            return x_BND + place_BND
        return x_BND + (self.alpha(x_BND, place_BND) * place_BND.astype(jnp.float32)).astype(x_BND.dtype)

    def alpha(self, x_BND: Float[Array, "B N D"], place_BND: Float[Array, "B N D"]) -> Float[Array, "B N 1"]:
        """How much of its place each patch gets, fp32."""
        return jax.nn.sigmoid(self.gate(jnp.concatenate([x_BND, place_BND], axis=-1)).astype(jnp.float32))

    def align(self, tokens_BNG: Float[Array, "B N G"], views_BNV: Float[Array, "B N V"]) -> Float[Array, "B M G"]:
        """G^vc: geometry that knows its view, patch by patch, and a token of the whole view behind it (eq. 2-3)."""
        aligned_BNG = self.va(jnp.concatenate([tokens_BNG, self.psi_v(views_BNV)], axis=-1))
        whole_B1V = views_BNV.astype(jnp.float32).mean(1, keepdims=True).astype(views_BNV.dtype)
        return jnp.concatenate([aligned_BNG, self.psi_g(whole_B1V)], axis=1)


def split_heads(config: VLM2Config, width: int) -> dict[str, int]:
    """The axes of queries, keys and values. Raises ValueError where heads do not divide the width."""
    if width % config.heads:
        raise ValueError(f"memory.heads must divide the width of the tower {width}, got {config.heads}")
    return {"heads": config.heads, "head_dim": width // config.heads}


def zero_started(linear: Linear) -> Linear:
    """A map that gives nothing before it is trained."""
    linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
    return linear
