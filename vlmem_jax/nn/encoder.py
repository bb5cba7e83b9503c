"""A pre-norm transformer encoder as PyTorch's `TransformerEncoderLayer(norm_first=True, activation="gelu")` has it."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from vlmem_jax.nn.attention import attend
from vlmem_jax.nn.linear import Linear, fan_in_uniform
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.runtime.sharding import constrain

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes; the hidden width is `ff_mult` times the width."""

    layers: int = 2
    heads: int = 8
    ff_mult: int = 4

    def __post_init__(self):
        if min(self.layers, self.heads, self.ff_mult) < 1:
            raise ValueError(f"layers, heads and ff_mult must be at least 1, got {self}")

    def flops(self, width: int, tokens: int) -> tuple[int, int]:
        """Forward FLOPs of a row of so many tokens of this width: in weights, and in attention."""
        weights = self.layers * 2 * tokens * width * width * (4 + 2 * self.ff_mult)
        return weights, self.layers * 4 * tokens**2 * width


class SelfAttention(nnx.Module):
    """Multi-head attention without positions; all maps have biases."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        embed, split = {"embed": width}, {"heads": heads, "head_dim": width // heads}
        xavier = fan_in_uniform(4 * width / 6)  # of q, k and v as one matrix
        self.q, self.k, self.v = (Linear(embed, split, bias=True, init=xavier, rngs=rngs) for _ in range(3))
        self.o = Linear(split, embed, bias=True, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], allowed_BTS: Bool[Array, "B T S"]) -> Float[Array, "B T D"]:
        return self.o(attend(self.q(x_BTD), self.k(x_BTD), self.v(x_BTD), allowed_BTS))


class EncoderLayer(nnx.Module):
    """x + attention(norm1 x), then x + W2 gelu(W1 norm2 x)."""

    def __init__(self, config: EncoderConfig, width: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(width, NORM_EPS, rngs=rngs)
        self.attn = SelfAttention(width, config.heads, rngs=rngs)
        self.norm2 = LayerNorm(width, NORM_EPS, rngs=rngs)
        self.mlp = GeluMLP(width, config.ff_mult * width, width, bias_init=fan_in_uniform, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], allowed_BTS: Bool[Array, "B T S"]) -> Float[Array, "B T D"]:
        x_BTD += self.attn(self.norm1(x_BTD), allowed_BTS)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class Encoder(nnx.Module):
    """Stacked layers and a final norm."""

    def __init__(self, config: EncoderConfig, width: int, *, rngs: nnx.Rngs):
        if width % config.heads:
            raise ValueError(f"heads must divide the width {width}, got {config.heads}")
        self.layers = stack(lambda rngs: EncoderLayer(config, width, rngs=rngs), config.layers, rngs)
        self.norm = LayerNorm(width, NORM_EPS, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"], allowed_BTS: Bool[Array, "B T S"]) -> Float[Array, "B T D"]:
        """Layers are recomputed in the backward pass: their T x S scores outweigh all else."""
        graph, layers = nnx.split(self.layers)

        def body(x_BTD, state):
            x_BTD = constrain(x_BTD, "batch", None, None)  # weights come to the rows, not rows to the weights
            return constrain(nnx.merge(graph, state)(x_BTD, allowed_BTS), "batch", None, None), None

        return self.norm(jax.lax.scan(remat(body, "full"), x_BTD, layers)[0])
