"""A pre-norm decoder with grouped-query attention, scanned over its layers.

It knows that something may stand before or after some of them (`Tap`), not what.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.nn.attention import causal_attention
from vlmem_jax.nn.cached_attention import appended_attention
from vlmem_jax.nn.embedding import look_up
from vlmem_jax.nn.linear import Linear, param
from vlmem_jax.nn.lora import Adapters, LayerAdapters, LinearMap, adapted
from vlmem_jax.nn.mlp import GatedMLP
from vlmem_jax.nn.norm import RMSNorm
from vlmem_jax.nn.rope import Rotation, rotate
from vlmem_jax.nn.stack import remat, stack
from vlmem_jax.runtime.sharding import constrain
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
    rope_interleaved: bool = False
    """Whether the three sections take turns over the pairs; if not, each follows the one before it."""
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of each head's query and key before they turn."""
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
        last_pairs = [axis + 3 * (pairs - 1) for axis, pairs in enumerate(self.rope_sections)][1:]
        if self.rope_interleaved and max(last_pairs, default=0) >= self.head_dim // 2:
            raise ValueError(
                "rope_sections of rows and columns must be a third of the pairs at most, to take turns; "
                f"got {self.rope_sections}"
            )

    @property
    def rope_axes(self) -> tuple[int, ...]:
        """The axis of positions that each pair of a head turns by: 0 time, 1 row, 2 column; none: there is one axis."""
        time, *others = self.rope_sections or (0,)
        if not self.rope_interleaved:
            return tuple(axis for axis, pairs in enumerate(self.rope_sections) for _ in range(pairs))
        axes = [0] * sum(self.rope_sections)
        for axis, pairs in enumerate(others, 1):
            axes[axis : 3 * pairs : 3] = [axis] * pairs
        return tuple(axes)

    def flops(self, tokens: Any) -> tuple[Any, Any]:
        """Forward FLOPs of the layers for a sample of so many tokens: in their weights, and in attention. The head is
        apart."""
        weights = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads) + 3 * self.width * self.mlp_width
        return self.layers * 2 * tokens * weights, self.layers * 2 * tokens**2 * self.heads * self.head_dim

    @property
    def linear_maps(self) -> dict[str, LinearMap]:
        """The maps of a layer by the name that adapters have for them."""
        embed, mlp = ("embed", self.width), ("mlp", self.mlp_width)
        heads, kv_heads = ("heads", self.heads * self.head_dim), ("kv_heads", self.kv_heads * self.head_dim)
        shapes = {"q": (embed, heads), "k": (embed, kv_heads), "v": (embed, kv_heads), "o": (heads, embed)}
        maps = {name: LinearMap(f"attn/{name}", *shape) for name, shape in shapes.items()}
        shapes = {"gate": (embed, mlp), "up": (embed, mlp), "down": (mlp, embed)}
        return maps | {name: LinearMap(f"mlp/{name}", *shape) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Tap:
    """Something that stands before some layers, or `after` them: `apply(x's, x_BTD) -> x_BTD`."""

    layers: tuple[int, ...]
    """Numbers of the layers, rising."""
    xs: Any
    """Arrays of the tap for each of these layers, stacked."""
    apply: Callable[[Any, jax.Array], jax.Array]
    after: bool = False
    every: int = 1
    """Layers from one to the next: the decoder is scanned in groups of so many."""


@dataclasses.dataclass(frozen=True)
class _Run:
    """`groups` groups of layers from `first` on, in which taps stand at the same places: `places[i]` are the taps, by
    number, of layer i of each group."""

    first: int
    groups: int
    places: tuple[tuple[int, ...], ...]


def _runs(layers: int, taps: Sequence[Tap]) -> Iterator[_Run]:
    """The layers as few runs. Raises ValueError for a tap at a layer that there is not."""
    for tap in taps:
        if tap.layers and tap.layers[-1] >= layers:
            raise ValueError(
                f"a tap stands at layer {tap.layers[-1]}, counted from 0; model.decoder.layers is {layers}"
            )
    places = [tuple(n for n, tap in enumerate(taps) if layer in tap.layers) for layer in range(layers)]
    every = math.lcm(*(tap.every for tap in taps))
    whole = layers // every * every
    for size, first, end in ((every, 0, whole), (1, whole, layers)):
        groups = (tuple(places[at : at + size]) for at in range(first, end, size))
        for group, same in itertools.groupby(groups):
            count = len(list(same))
            yield _Run(first, count, group)
            first += count * size


class SelfAttention(nnx.Module):
    """Projections around `core(q, k, v, tables) -> (out, extra)`, which turns q and k by the tables and decides what
    attends to what."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        embed, C = {"embed": config.width}, {"head_dim": config.head_dim}
        self.q = Linear(embed, {"heads": config.heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(embed, {"kv_heads": config.kv_heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(embed, {"kv_heads": config.kv_heads} | C, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear({"heads": config.heads} | C, embed, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, rngs=rngs) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, rngs=rngs) if config.qk_norm else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tables: Rotation, core: Callable, lora: LayerAdapters | None = None
    ) -> tuple[jax.Array, Any]:
        q_BTHC, k_BTKC = adapted(self.q, "q", x_BTD, lora), adapted(self.k, "k", x_BTD, lora)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        out_BTHC, extra = core(q_BTHC, k_BTKC, adapted(self.v, "v", x_BTD, lora), tables)
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

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Scores of every token, in fp32."""
        kernel = self.embed[...].T if self.head is None else self.head.kernel[...]
        return jnp.einsum("...D,DV->...V", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tables: Rotation,
        segments_BT: Int32[Array, "B T"],
        *,
        prefix_BT: Int32[Array, "B T"] | None = None,
        taps: Sequence[Tap] = (),
        cache: KVCache | None = None,
        cache_index_BT: Int32[Array, "B T"] | None = None,
        cache_used: Int32[Array, ""] | int | None = None,
        lora: Adapters | None = None,
        remat_policy: str = "none",
    ) -> tuple[Float[Array, "B T D"], KVCache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values.

        Without a cache the tokens also attend to the segment `prefix_BT` of their row, see `Text`.
        Without `cache_index_BT` the tokens attend to each other (training; the first tokens where a cache is given,
        written from slot 0). With it, token t is written to that slot of its row's cache (a slot beyond the capacity:
        nowhere) and attends to all slots up to it. `cache_used`: so many slots are filled then, at most; others are not
        read.
        """
        graph, layers = nnx.split(self.layers)
        layers = layers, lora.weights if lora else {}

        def layer(x_BTD, cache, state, index):
            def core(q_BTHC, k_BTKC, v_BTKC, tables):
                if cache is None:
                    return causal_attention(q_BTHC, k_BTKC, v_BTKC, segments_BT, tables, prefix_BT), None
                if cache_index_BT is not None:
                    return appended_attention(q_BTHC, k_BTKC, v_BTKC, tables, cache, index, cache_index_BT, cache_used)
                q_BTHC, k_BTKC = rotate(q_BTHC, tables), rotate(k_BTKC, tables)
                return causal_attention(q_BTHC, k_BTKC, v_BTKC, segments_BT), cache.write(index, k_BTKC, v_BTKC)

            weights, adapters = state
            adapters = lora.layer(adapters, index) if lora else None
            return nnx.merge(graph, weights)(x_BTD, tables, core, adapters)

        def plain(carry, xs):
            return remat(layer, remat_policy)(*carry, *xs), None

        def tapped(places: tuple[int, ...]) -> Callable:
            """A layer with the taps of these numbers."""

            def run(x_BTD, cache, state, index, xs):
                for after in (False, True):
                    for n in places:
                        if taps[n].after == after:
                            x_BTD = taps[n].apply(xs[n], x_BTD)
                    if not after:
                        x_BTD, cache = layer(x_BTD, cache, state, index)
                return x_BTD, cache

            return remat(run, remat_policy)

        def group(run: _Run) -> Callable:
            """A group of a run: between layers with taps, loops over those without."""
            # decoding reads weights where they lie; a loop of its own would copy them to itself for every token
            unroll = len(run.places) if cache_index_BT is not None else 1

            def body(carry, xs):
                states, tap_xs, first = xs
                for has_taps, some in itertools.groupby(range(len(run.places)), lambda n: bool(run.places[n])):
                    some = list(some)
                    if not has_taps:
                        part = jax.tree.map(lambda leaf, some=some: leaf[some[0] : some[-1] + 1], states)
                        xs = part, first + jnp.arange(some[0], some[-1] + 1)
                        carry, _ = jax.lax.scan(plain, carry, xs, unroll=min(unroll, len(some)))
                        continue
                    for n in some:
                        state = jax.tree.map(lambda leaf, n=n: leaf[n], states)
                        own = {p: tap_xs[n, p] for p in run.places[n]}
                        carry = tapped(run.places[n])(*carry, state, first + n, own)
                return carry, None

            return body

        carry = x_BTD, cache
        for run in _runs(self.config.layers, taps):
            size, end = len(run.places), run.first + run.groups * len(run.places)
            states = jax.tree.map(lambda leaf, a=run.first, b=end: leaf[a:b], layers)
            if size == 1 and not run.places[0]:
                carry, _ = jax.lax.scan(plain, carry, (states, jnp.arange(run.first, end)))
                continue
            states = jax.tree.map(lambda leaf, n=run.groups, m=size: leaf.reshape(n, m, *leaf.shape[1:]), states)
            tap_xs = {
                (n, p): _at(taps[p], range(run.first + n, end, size)) for n, some in enumerate(run.places) for p in some
            }
            xs = states, tap_xs, run.first + jnp.arange(run.groups) * size
            carry, _ = jax.lax.scan(group(run), carry, xs)
        x_BTD, cache = carry
        return self.norm(x_BTD), cache


def _at(tap: Tap, layers: range) -> Any:
    """The arrays of a tap for these layers."""
    index = [tap.layers.index(layer) for layer in layers]
    step = index[1] - index[0] if len(index) > 1 else 1
    return jax.tree.map(lambda leaf: leaf[index[0] : index[-1] + 1 : step], tap.xs)
