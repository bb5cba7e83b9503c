"""A pre-norm decoder with grouped-query attention, scanned over groups of layers.

It knows that something may stand before the last layer of every group (`Interleaved`), not what.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.attention import attend, causal_attention
from vlmem_jax.nn.embedding import look_up
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.lora import Adapters, LayerAdapters, Shapes, adapted
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import Rotation, rotate
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.sharding import constrain
from vlmem_jax.types import KVCache


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the language model; positions in tokens."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    ntk_factor: float = 0.0
    """Dynamic NTK scaling of rows longer than max_positions; 0: none."""
    max_positions: int = 32768
    rope_sections: tuple[int, ...] = ()
    """M-RoPE: pairs of a head that turn by a token's time, row and column; none: one position a token."""
    qkv_bias: bool = False
    tied: bool = False
    """Whether the token table is the head, too."""

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads {self.kv_heads}, got {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.rope_sections and (len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_dim):
            raise ValueError(
                f"rope_sections must be three numbers that add up to head_dim / 2 = {self.head_dim // 2}, "
                f"got {self.rope_sections}"
            )

    @property
    def adapter_shapes(self) -> Shapes:
        """What adapters of the layers' maps take and give."""
        embed, mlp = ("embed", self.width), ("mlp", self.mlp_width)
        heads, kv_heads = ("heads", self.heads * self.head_dim), ("kv_heads", self.kv_heads * self.head_dim)
        shapes = {"q": (embed, heads), "k": (embed, kv_heads), "v": (embed, kv_heads), "o": (heads, embed)}
        return shapes | {"gate": (embed, mlp), "up": (embed, mlp), "down": (mlp, embed)}


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """A block before every `every`-th layer: `apply(block, xs, x) -> x`, `blocks` and `xs` stacked over blocks."""

    every: int
    blocks: Any
    xs: Any
    apply: Callable[[Any, Any, jax.Array], jax.Array]


class SelfAttention(nnx.Module):
    """Projections around `core(q, k, v) -> (out, extra)`, which decides what attends to what."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        embed, C = {"embed": config.width}, {"head_dim": config.head_dim}
        self.q = Linear(embed, {"heads": config.heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(embed, {"kv_heads": config.kv_heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(embed, {"kv_heads": config.kv_heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear({"heads": config.heads} | C, embed, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tables: Rotation, core: Callable, lora: LayerAdapters | None = None
    ) -> tuple[jax.Array, Any]:
        q_BTHC = rotate(adapted(self.q, "q", x_BTD, lora), tables)
        k_BTKC = rotate(adapted(self.k, "k", x_BTD, lora), tables)
        out_BTHC, extra = core(q_BTHC, k_BTKC, adapted(self.v, "v", x_BTD, lora))
        return adapted(self.o, "o", out_BTHC, lora), extra


class DecoderLayer(nnx.Module):
    """Self-attention and gated MLP, each normalised before and added after."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.attn = SelfAttention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.mlp = GatedMLP(config.width, config.mlp_width, rngs=rngs)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tables: Rotation, core: Callable, lora: LayerAdapters | None = None
    ) -> tuple[jax.Array, Any]:
        attended, extra = self.attn(self.attn_norm(x_BTD), tables, core, lora)
        x_BTD = constrain(x_BTD + attended, "batch", "tokens", None)
        return constrain(x_BTD + self.mlp(self.mlp_norm(x_BTD), lora), "batch", "tokens", None), extra


class Decoder(nnx.Module):
    """Token table, layers, final norm and head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed = param(init, (config.vocab, config.width), ("vocab", "embed"), rngs)
        self.layers = stack(lambda rngs: DecoderLayer(config, rngs=rngs), config.layers, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps, rngs=rngs)
        self.head = None if config.tied else Linear({"embed": config.width}, {"vocab": config.vocab}, rngs=rngs)

    def embeddings(self, tokens_BT: Int32[Array, "B T"], dtype) -> Float[Array, "B T D"]:
        """Rows of the token table."""
        return look_up(self.embed[...], tokens_BT, dtype)

    def tables(self) -> tuple[Float[Array, "V D"], Float[Array, "V D"]]:
        """Rows of each token as it goes in, and as it is scored."""
        embed_VD = self.embed[...]
        return embed_VD, embed_VD if self.head is None else self.head.kernel[...].T

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Scores of every token, in fp32."""
        kernel = self.embed[...].T if self.head is None else self.head.kernel[...]
        return jnp.einsum("BTD,DV->BTV", x_BTD, kernel.astype(x_BTD.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tables: Rotation,
        segments_BT: Int32[Array, "B T"],
        *,
        between: Interleaved | None = None,
        cache: KVCache | None = None,
        cache_index_BT: Int32[Array, "B T"] | None = None,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values.

        Without `cache_index_BT` the tokens attend to each other (training; prefill where a cache is given, written
        from slot 0). With it, token t is written to that slot of its row's cache (a slot beyond the capacity: nowhere)
        and attends to all slots up to it.
        """
        graph, layers = nnx.split(self.layers)
        layers = layers, lora.weights if lora else {}

        def layer(x_BTD, cache, state, index):
            def core(q_BTHC, k_BTKC, v_BTKC):
                if cache is None:
                    return causal_attention(q_BTHC, k_BTKC, v_BTKC, segments_BT), None
                updated = cache.write(index, k_BTKC, v_BTKC, cache_index_BT)
                if cache_index_BT is None:
                    return causal_attention(q_BTHC, k_BTKC, v_BTKC, segments_BT), updated
                k_BSKC, v_BSKC = updated.layer(index)
                allowed_BTS = jnp.arange(k_BSKC.shape[1]) <= cache_index_BT[:, :, None]
                return attend(q_BTHC, k_BSKC, v_BSKC, allowed_BTS), updated

            weights, adapters = state
            adapters = lora.layer(adapters, index) if lora else None
            return nnx.merge(graph, weights)(x_BTD, tables, core, adapters)

        def plain(carry, xs):
            return remat(layer, remat_policy)(*carry, *xs), None

        def group(carry, xs):
            """A memory block, and the layers up to the one that it stands before."""
            states, block, block_xs, first = xs
            # decoding reads weights where they lie; a loop of its own would copy them to itself for every token
            unroll = every - 1 if cache_index_BT is not None else 1
            if every > 1:
                before = jax.tree.map(lambda leaf: leaf[:-1], states), first + jnp.arange(every - 1)
                carry, _ = jax.lax.scan(plain, carry, before, unroll=unroll)

            def last(x_BTD, cache, state, block, block_xs):
                return layer(between.apply(block, block_xs, x_BTD), cache, state, first + every - 1)

            state = jax.tree.map(lambda leaf: leaf[-1], states)
            return remat(last, remat_policy)(*carry, state, block, block_xs), None

        carry, done = (x_BTD, cache), 0
        if between:
            every = between.every
            groups = self.config.layers // every
            done = groups * every
            grouped = jax.tree.map(lambda leaf: leaf[:done].reshape(groups, every, *leaf.shape[1:]), layers)
            xs = grouped, between.blocks, between.xs, jnp.arange(groups) * every
            carry, _ = jax.lax.scan(group, carry, xs)
        if done < self.config.layers:
            rest = jax.tree.map(lambda leaf: leaf[done:], layers)
            carry, _ = jax.lax.scan(plain, carry, (rest, jnp.arange(done, self.config.layers)))
        x_BTD, cache = carry
        return self.norm(x_BTD), cache
