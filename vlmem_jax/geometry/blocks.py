"""Transformer blocks of models of geometry: within each view and over all of them in turns, places in a view by RoPE.

Axis letters: N views, T tokens of each, special ones first, D width; V tokens of all views, N * T.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.attention import AttentionConfig, full_attention
from vlmem_jax.nn.linear import Linear, ones, param
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.nn.norm import LayerNorm
from vlmem_jax.nn.rope import Rotation, frequencies, rotate, rotation
from vlmem_jax.nn.stack import stack

ROPE_BASE = 100.0
QK_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Sizes of a block, and what it has of its own."""

    width: int
    heads: int
    mlp_width: int
    norm_eps: float = 1e-6
    qk_norm: bool = False
    """LayerNorm of q and of k, head by head, before they are turned."""
    layer_scale: bool = True
    rope: bool = False
    """q and k are turned by the place in the view. Pairs of channels that turn by the row come first, then those that
    turn by the column, and first elements of all pairs before second ones: public weights are ordered otherwise."""
    dtype: str = "bfloat16"
    """Of matrix products; what goes from block to block is fp32."""
    attention: AttentionConfig = AttentionConfig()

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"heads must divide the width {self.width}, got {self.heads}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def flops(self, tokens: int, keys: int) -> int:
        """FLOPs of so many tokens that attend to so many each: 2 per multiply-add of matrix products alone."""
        return 2 * tokens * self.width * (4 * self.width + 2 * self.mlp_width) + 4 * tokens * keys * self.width


class Attention(nnx.Module):
    """Full attention."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config = config
        split = {"heads": config.heads, "head_dim": config.head_dim}
        self.qkv = Linear({"embed": config.width}, {"qkv": 3, **split}, bias=True, rngs=rngs)
        self.proj = Linear(split, {"embed": config.width}, bias=True, rngs=rngs)
        norms = (LayerNorm(config.head_dim, QK_NORM_EPS, rngs=rngs) if config.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms

    def __call__(self, x_BTD: Float[Array, "B T D"], places: Rotation | None) -> Float[Array, "B T D"]:
        shape = (*x_BTD.shape[:2], self.config.heads, self.config.head_dim)
        q_BTHC, k_BTHC, v_BTHC = (self.qkv.part(x_BTD, n).reshape(shape) for n in range(3))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTHC = self.q_norm(q_BTHC), self.k_norm(k_BTHC)
        if self.config.rope:
            q_BTHC, k_BTHC = rotate(q_BTHC, places), rotate(k_BTHC, places)
        return self.proj(full_attention(self.config.attention, q_BTHC, k_BTHC, v_BTHC, x_BTD.shape[1]))


class Block(nnx.Module):
    """x + s1 * attention(norm1 x), then x + s2 * W2 gelu(W1 norm2 x), each scaled per channel or not."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.norm1, self.norm2 = (LayerNorm(config.width, config.norm_eps, rngs=rngs) for _ in range(2))
        self.attn = Attention(config, rngs=rngs)
        self.mlp = GeluMLP(config.width, config.mlp_width, config.width, rngs=rngs)
        scales = (param(ones, (config.width,), ("norm",), rngs) if config.layer_scale else None for _ in range(2))
        self.ls1, self.ls2 = scales

    def __call__(self, x_BTD: Float[Array, "B T D"], places: Rotation | None = None) -> Float[Array, "B T D"]:
        attn = self.attn(self.norm1(x_BTD).astype(self.config.dtype), places)
        x_BTD += self._scaled(attn, self.ls1)
        return x_BTD + self._scaled(self.mlp(self.norm2(x_BTD).astype(self.config.dtype)), self.ls2)

    def _scaled(self, x_BTD: Float[Array, "B T D"], scale: nnx.Param | None) -> Float[Array, "B T D"]:
        x_BTD = x_BTD.astype(jnp.float32)
        return x_BTD if scale is None else scale[...] * x_BTD


def through(blocks: Block, x_BTD: Float[Array, "B T D"], places: Rotation | None = None) -> Float[Array, "B T D"]:
    """What comes out of stacked blocks, one after the other."""
    graph, layers = nnx.split(blocks)

    def body(x_BTD, state):
        return nnx.merge(graph, state)(x_BTD, places), None

    return jax.lax.scan(body, x_BTD, layers)[0]


class Pair(nnx.Module):
    """A block among the tokens of each view, then one among those of all."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.within, self.across = Block(config, rngs=rngs), Block(config, rngs=rngs)

    def __call__(
        self, x_NTD: Float[Array, "N T D"], places: Rotation
    ) -> tuple[Float[Array, "N T D"], Float[Array, "N T D"]]:
        """What comes out of each of the two."""
        within_NTD = self.within(x_NTD, places)
        x_1VD, of_all = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), (within_NTD, places))
        return within_NTD, self.across(x_1VD, of_all).reshape(x_NTD.shape)


class AlternatingTrunk(nnx.Module):
    """Pairs of blocks, one after the other (pi3, arXiv 2507.13347; VGGT, arXiv 2503.11651)."""

    def __init__(self, config: BlockConfig, pairs: int, *, rngs: nnx.Rngs):
        self.pairs = stack(lambda rngs: Pair(config, rngs=rngs), pairs, rngs)
        self.count = pairs

    def __call__(
        self, x_NTD: Float[Array, "N T D"], places: Rotation, keep: tuple[int, ...]
    ) -> Float[Array, "K N T 2*D"]:
        """What comes out of both blocks, side by side, of the pairs `keep`, in order; the last pair is one of them."""
        graph, pairs = nnx.split(self.pairs)

        def body(carry, pair):
            x_NTD, kept = carry
            number, state = pair
            within_NTD, x_NTD = nnx.merge(graph, state)(x_NTD, places)
            both = jnp.concatenate([within_NTD, x_NTD], axis=-1)
            # each pair writes where the next one of `keep` belongs, which so is the last to write there
            slot = (jnp.asarray(keep) < number).sum()
            return (x_NTD, jax.lax.dynamic_update_index_in_dim(kept, both, slot, 0)), None

        kept = jnp.zeros((len(keep), *x_NTD.shape[:2], 2 * x_NTD.shape[2]), x_NTD.dtype)
        return jax.lax.scan(body, (x_NTD, kept), (jnp.arange(self.count), pairs))[0][1]


# --- places -----------------------------------------------------------------------------------------------------------


def grid_positions(rows: int, columns: int, special: int) -> Int32[np.ndarray, "T 2"]:
    """Row and column of each token of a view, counted from 1; of those that stand for no patch, which go first, 0."""
    patches = np.indices((rows, columns)).reshape(2, -1).T + 1
    return np.concatenate([np.zeros((special, 2)), patches]).astype(np.int32)


def places_of(positions_BT2: Int32[Array | np.ndarray, "B T 2"], head_dim: int) -> Rotation:
    """Tables for heads of so many channels, see `BlockConfig.rope`."""
    of_axis = frequencies(head_dim // 2, ROPE_BASE)
    axes = np.repeat((0, 1), len(of_axis))
    return rotation(jnp.asarray(positions_BT2), jnp.tile(of_axis, 2), tuple(axes.tolist()))
