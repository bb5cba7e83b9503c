"""One decoder for every family: what stands beside its layers, what a pair turns by, norms of queries and keys."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.decoder import Decoder, DecoderConfig, Tap
from vlmem_jax.models.vlm import deep_tap
from vlmem_jax.nn import cached_attention
from vlmem_jax.nn.attention import causal_attention
from vlmem_jax.nn.rope import frequencies, rotation
from vlmem_jax.types import KVCache, VisualTokens

CONFIG = DecoderConfig(
    vocab=20, width=12, layers=7, heads=2, kv_heads=1, head_dim=8, mlp_width=16, rope_sections=(2, 1, 1),
    rope_interleaved=True, qk_norm=True,
)  # fmt: skip
B, T = 2, 6


@pytest.fixture(scope="module")
def decoder():
    made = Decoder(CONFIG, rngs=nnx.Rngs(0))
    # norms that do something
    for norm in (made.layers.attn.q_norm, made.layers.attn.k_norm):
        norm.scale[...] = 1 + jax.random.uniform(jax.random.key(1), norm.scale.shape)
    return made


@pytest.fixture(scope="module")
def inputs():
    keys = jax.random.split(jax.random.key(0), 2)
    positions_BT3 = jax.random.randint(keys[0], (B, T, 3), 0, 9)
    tables = rotation(positions_BT3, frequencies(CONFIG.head_dim, 1e4), CONFIG.rope_axes)
    return jax.random.normal(keys[1], (B, T, CONFIG.width)), tables, jnp.ones((B, T), jnp.int32)


def layer_by_layer(decoder, x_BTD, tables, segments_BT, taps):
    """A plain loop over layers."""
    graph, layers = nnx.split(decoder.layers)
    for n in range(CONFIG.layers):
        layer = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], layers))
        for after in (False, True):
            for tap in taps:
                if n in tap.layers and tap.after == after:
                    own = jax.tree.map(lambda leaf, tap=tap, n=n: leaf[tap.layers.index(n)], tap.xs)
                    x_BTD = tap.apply(own, x_BTD)
            if not after:
                x_BTD, _ = layer(
                    x_BTD, tables, lambda q, k, v, turn: (causal_attention(q, k, v, segments_BT, turn), None)
                )
    return decoder.norm(x_BTD)


def scaled(layers, **options):
    """A tap that is told by where it stands."""
    factors = 1 + jnp.arange(1.0, len(layers) + 1) / 7
    return Tap(tuple(layers), factors, lambda factor, x: factor * x + 0.1, **options)


@pytest.mark.parametrize(
    "taps",
    [
        [],
        [scaled((2, 5), every=3)],
        [scaled((0, 1, 2), after=True)],
        [scaled((0, 1, 2), after=True), scaled((1, 3, 5), every=2)],
        [scaled(range(7), after=True), scaled((6,), every=7), scaled((2, 5), every=3)],
    ],
    ids=["none", "every third", "after the first", "both", "everywhere"],
)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_taps_stand_where_they_say(decoder, inputs, taps, remat):
    run = jax.jit(lambda x, tables, segments: decoder(x, tables, segments, taps=taps, remat_policy=remat)[0])
    expected = jax.jit(lambda *inputs: layer_by_layer(decoder, *inputs, taps))(*inputs)
    np.testing.assert_allclose(run(*inputs), expected, atol=1e-5)


def test_the_program_does_not_grow_with_depth(decoder, inputs):
    def loops(layers: int) -> int:
        made = Decoder(dataclasses.replace(CONFIG, layers=layers), rngs=nnx.Rngs(0))
        taps = [scaled((0, 1, 2), after=True), scaled(range(1, layers, 2), every=2)]
        return str(jax.make_jaxpr(lambda *x: made(*x, taps=taps)[0])(*inputs)).count("scan[")

    assert loops(12) == loops(40)


def test_layers_add_to_visual_tokens_alone(decoder, inputs):
    x_BTD, *rest = inputs
    deep_NBMD = jax.random.normal(jax.random.key(3), (3, B, 4, CONFIG.width))
    visual = VisualTokens(jnp.zeros((B, 4, CONFIG.width)), jnp.zeros((B, 4, 3), int), jnp.ones((B, 4), int), deep_NBMD)
    # placeholders of tokens 2, 0 and 3; 4 is a latent token, to which nothing is added
    index_BT = jnp.array([[-1, 2, 0, -1, 3, 4], [-1, -1, -1, -1, -1, -1]])
    added_NBTD = jnp.zeros((3, B, T, CONFIG.width))
    added_NBTD = added_NBTD.at[:, 0, jnp.array([1, 2, 4])].set(deep_NBMD[:, 0, jnp.array([2, 0, 3])])
    taps = deep_tap(visual, index_BT), Tap((0, 1, 2), added_NBTD, lambda added, x: x + added, after=True)
    found, expected = (jax.jit(lambda x, tap=tap: decoder(x, *rest, taps=[tap])[0])(x_BTD) for tap in taps)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_pairs_turn_by_their_axes():
    assert CONFIG.rope_axes == (0, 1, 2, 0)
    blocks = dataclasses.replace(CONFIG, rope_interleaved=False)
    assert blocks.rope_axes == (0, 0, 1, 2)
    # as released: 24, 20 and 20 of 64 pairs, in turns as long as there are three
    released = dataclasses.replace(CONFIG, head_dim=128, rope_sections=(24, 20, 20)).rope_axes
    assert released == (0, 1, 2) * 20 + (0,) * 4
    assert dataclasses.replace(CONFIG, rope_sections=(), rope_interleaved=False).rope_axes == ()
    with pytest.raises(ValueError, match=r"a third of the pairs at most, to take turns; got \(1, 1, 2\)"):
        dataclasses.replace(CONFIG, rope_sections=(1, 1, 2))
    positions_BT3 = jax.random.randint(jax.random.key(0), (B, T, 3), 0, 50)
    cos, _ = rotation(positions_BT3, frequencies(8, 1e4), CONFIG.rope_axes)
    for pair, axis in enumerate(CONFIG.rope_axes):
        alone, _ = rotation(positions_BT3[..., axis], frequencies(8, 1e4))
        np.testing.assert_array_equal(cos[..., pair], alone[..., pair])


def test_queries_and_keys_are_normed_by_head_before_they_turn(decoder, inputs):
    x_BTD, tables, _ = inputs
    graph, layers = nnx.split(decoder.layers)
    layer = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], layers))
    seen = []
    layer.attn(x_BTD, tables, lambda q, k, v, tables: (seen.extend([q, k]) or q, None))
    for x, linear, norm in zip(seen, (layer.attn.q, layer.attn.k), (layer.attn.q_norm, layer.attn.k_norm), strict=True):
        raw = linear(x_BTD)
        normed = raw / jnp.sqrt((raw**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * norm.scale[...]
        # turning keeps the length of a head
        np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(normed, axis=-1), rtol=1e-5)
        assert norm.scale.shape == (CONFIG.head_dim,)


def test_chunks_read_by_the_kernels_for_caches_are_what_xla_reads(monkeypatch):
    """A chunk, of which one row has a token less, and a token after it."""
    config = dataclasses.replace(CONFIG, layers=2, heads=4, kv_heads=2, head_dim=128, rope_sections=())
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(0), (B, 6, config.width))
    cos, sin = rotation(jnp.arange(6)[None].repeat(B, 0), frequencies(config.head_dim, 1e4))

    def read():
        cache, hidden = KVCache.empty(2, B, 128, 2, 128, jnp.float32), []
        for part, index in ((slice(0, 5), [[0, 1, 2, 3, 4], [0, 1, 2, 3, 128]]), (slice(5, 6), [[5], [4]])):
            tokens = x_BTD[:, part], (cos[:, part], sin[:, part]), jnp.ones_like(jnp.array(index))
            out_BTD, cache = decoder(*tokens, cache=cache, cache_index_BT=jnp.array(index))
            hidden.append(out_BTD)
        return jnp.concatenate(hidden, axis=1).at[1, 4].set(0), cache

    wanted = jax.jit(read)()
    monkeypatch.setattr(cached_attention, "cache_backend", lambda *_: "tpu_interpret")
    found = jax.jit(lambda: read())()
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, wanted)
