"""CoMemo (arXiv 2506.06279): before every E-th decoder layer, a gated block lets each token of the sequence attend,
without causality, to all visual tokens of its sample.

The memory is the very tensor that is spliced into the sequence; it is never updated. Its keys and values depend on the
block alone, so decoding computes them once a prompt.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.decoder import DecoderConfig, Interleaved
from vlmem_jax.memory.base import Memory, VisualTokens
from vlmem_jax.nn.attention import attend, same_segment
from vlmem_jax.nn.linear import Linear, param, zeros
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import Rotation, frequencies, rotate, rotation
from vlmem_jax.nn.stack import stack
from vlmem_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class CoMemoConfig:
    """Sizes of the memory blocks; width is the decoder's."""

    every: int = 4
    """A block stands before each decoder layer l with (l + 1) % every == 0."""
    heads: int = 16
    head_dim: int = 128
    mlp_width: int = 8192
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    decode_position: Literal["continue", "length"] = "continue"
    """Position of generated tokens as memory queries: the next rotary position, or (as the published inference code
    does, unlike its training) the number of tokens so far."""

    def __post_init__(self):
        if min(self.every, self.heads, self.head_dim, self.mlp_width) < 1 or self.head_dim % 2:
            raise ValueError(f"comemo sizes must be positive and head_dim even, got {self}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Recalled:
    """Rotated keys and values of every block, ready to be attended to."""

    k_LBMHC: Float[Array, "L B M H C"]
    v_LBMHC: Float[Array, "L B M H C"]
    segments_BM: Int32[Array, "B M"]


class MemoryAttention(nnx.Module):
    """Multi-head cross-attention; query and key heads are as many."""

    def __init__(self, config: CoMemoConfig, width: int, *, rngs: nnx.Rngs):
        heads = {"heads": config.heads, "head_dim": config.head_dim}
        self.q = Linear({"embed": width}, heads, rngs=rngs)
        self.k = Linear({"embed": width}, heads, rngs=rngs)
        self.v = Linear({"embed": width}, heads, rngs=rngs)
        self.o = Linear(heads, {"embed": width}, rngs=rngs)


class MemoryBlock(nnx.Module):
    """x + tanh(attn_gate) attention(norm x, norm memory), then x + tanh(mlp_gate) MLP(norm x). Gates start at 0."""

    def __init__(self, config: CoMemoConfig, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.attn_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.attn = MemoryAttention(config, width, rngs=rngs)
        self.attn_gate = param(zeros, (1,), ("scalar",), rngs)
        self.mlp_norm = RMSNorm(width, config.norm_eps, rngs=rngs)
        self.mlp = GatedMLP(width, config.mlp_width, rngs=rngs)
        self.mlp_gate = param(zeros, (1,), ("scalar",), rngs)

    def recall(
        self, tokens_BMD: Float[Array, "B M D"], tables: Rotation
    ) -> tuple[Float[Array, "B M H C"], Float[Array, "B M H C"]]:
        """Rotated keys and values of the memory, normalised by the norm that the text goes through."""
        normed = self.attn_norm(tokens_BMD)
        return rotate(self.attn.k(normed), tables), self.attn.v(normed)

    def cross_attention(
        self,
        x_BTD: Float[Array, "B T D"],
        tables: Rotation,
        k_BMHC: Float[Array, "B M H C"],
        v_BMHC: Float[Array, "B M H C"],
        allowed_BTM: Bool[Array, "B T M"] | None,
    ) -> Float[Array, "B T D"]:
        """What each token reads from the memory, before the gate."""
        q_BTHC = rotate(self.attn.q(self.attn_norm(x_BTD)), tables)
        return self.attn.o(attend(q_BTHC, k_BMHC, v_BMHC, allowed_BTM))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tables: Rotation,
        k_BMHC: Float[Array, "B M H C"],
        v_BMHC: Float[Array, "B M H C"],
        allowed_BTM: Bool[Array, "B T M"] | None,
        has_memory_BT: Bool[Array, "B T"] | None,
    ) -> Float[Array, "B T D"]:
        """One block. Tokens without memory pass unchanged, through attention and MLP alike."""

        def gated(gate: nnx.Param, residual_BTD: jax.Array) -> jax.Array:
            residual_BTD = jnp.tanh(gate[...].astype(jnp.float32)).astype(x_BTD.dtype) * residual_BTD
            return residual_BTD if has_memory_BT is None else jnp.where(has_memory_BT[..., None], residual_BTD, 0)

        x_BTD += gated(self.attn_gate, self.cross_attention(x_BTD, tables, k_BMHC, v_BMHC, allowed_BTM))
        x_BTD = constrain(x_BTD, "batch", "tokens", None)
        return constrain(x_BTD + gated(self.mlp_gate, self.mlp(self.mlp_norm(x_BTD))), "batch", "tokens", None)


class CoMemo(Memory):
    """The stacked blocks and their door."""

    def __init__(self, config: CoMemoConfig, decoder: DecoderConfig, *, rngs: nnx.Rngs):
        if config.every > decoder.layers:
            raise ValueError(f"comemo.every must be at most decoder.layers {decoder.layers}, got {config.every}")
        self.config = config
        count = decoder.layers // config.every
        self.blocks = stack(lambda rngs: MemoryBlock(config, decoder.width, rngs=rngs), count, rngs)

    def _rotation(self, positions: Int32[Array, "B T"]) -> Rotation:
        return rotation(positions, frequencies(self.config.head_dim, self.config.rope_theta))

    def attend(
        self, seen: VisualTokens | Recalled, positions_BT: Int32[Array, "B T"], segments_BT: Int32[Array, "B T"]
    ) -> Interleaved:
        graph, blocks = nnx.split(self.blocks)
        tables = self._rotation(positions_BT)
        allowed_BTM = same_segment(segments_BT, seen.segments_BM)
        has_memory_BT = allowed_BTM.any(axis=-1)
        recalled = isinstance(seen, Recalled)
        memory_tables = None if recalled else self._rotation(seen.positions_BM)

        def apply(state, kv, x_BTD):
            block = nnx.merge(graph, state)
            kv = kv if recalled else block.recall(seen.tokens_BMD, memory_tables)
            return block(x_BTD, tables, *kv, allowed_BTM, has_memory_BT)

        kv = (seen.k_LBMHC, seen.v_LBMHC) if recalled else None
        return Interleaved(self.config.every, blocks, kv, apply)

    def recall(self, seen: VisualTokens) -> Recalled:
        graph, blocks = nnx.split(self.blocks)
        tables = self._rotation(seen.positions_BM)

        def body(_, state):
            return None, nnx.merge(graph, state).recall(seen.tokens_BMD, tables)

        _, (k_LBMHC, v_LBMHC) = jax.lax.scan(body, None, blocks)
        return Recalled(k_LBMHC, v_LBMHC, seen.segments_BM)

    def metrics(self) -> dict[str, jax.Array]:
        """tanh of both gates of each block, by the decoder layer that it stands before."""
        every = self.config.every
        scalars = {}
        for kind, gates in (("attn", self.blocks.attn_gate[...]), ("mlp", self.blocks.mlp_gate[...])):
            for n in range(gates.shape[0]):
                scalars[f"gate/{kind}/{n * every + every - 1}"] = jnp.tanh(gates[n, 0])
        return scalars
