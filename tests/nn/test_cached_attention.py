"""Attention of tokens that are appended to a cache."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.memory_attention import reference
from vlmem_jax.nn import cached_attention as module
from vlmem_jax.nn.attention import attend
from vlmem_jax.nn.cached_attention import appended_attention, cached_attention, filled_attention, merged
from vlmem_jax.nn.rope import frequencies, rotation
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.types import KVCache

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def arrays(tokens: int, slots: int, rows: int = 2):
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTHC = jax.random.normal(keys[0], (rows, tokens, HEADS, WIDTH))
    return q_BTHC, *(jax.random.normal(key, (rows, slots, KV_HEADS, WIDTH)) for key in keys[1:])


@pytest.mark.parametrize("tokens, slots, starts", [(20, 61, (0, 37)), (33, 40, (3, 7)), (16, 5, (0, 0))])
def test_blocks_give_what_all_scores_at_once_give(monkeypatch, tokens, slots, starts):
    q_BTHC, k_BSKC, v_BSKC = arrays(tokens, slots)
    index_BT = jnp.array(starts)[:, None] + jnp.arange(tokens)
    allowed_BTS = jnp.arange(slots) <= index_BT[..., None]
    expected = attend(q_BTHC, k_BSKC, v_BSKC, allowed_BTS)
    monkeypatch.setattr(module, "CACHE_BLOCK", 8)
    found = jax.jit(cached_attention)(q_BTHC, k_BSKC, v_BSKC, index_BT)
    inside = np.asarray(index_BT < slots)
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_that_nobody_fills_are_not_read_and_change_no_bit(monkeypatch, tokens):
    """Not even where they hold what is not a number."""
    slots, layer = 61, jnp.int32(1)
    monkeypatch.setattr(module, "CACHE_BLOCK", 8)
    q_BTHC, k_BSKC, v_BSKC = arrays(tokens, slots)
    k_LBKSC, v_LBKSC = (jnp.stack([x * 0, x]).swapaxes(2, 3).at[..., 24:, :].set(jnp.nan) for x in (k_BSKC, v_BSKC))
    index_BT = jnp.array([2, 14])[:, None] + jnp.arange(tokens)
    expected = attend(q_BTHC, k_BSKC, v_BSKC, jnp.arange(slots) <= index_BT[..., None])
    read = jax.jit(filled_attention)
    found = read(q_BTHC, KVCache(k_LBKSC, v_LBKSC, None, None), layer, index_BT, jnp.int32(14 + tokens))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    filled = KVCache(jnp.nan_to_num(k_LBKSC), jnp.nan_to_num(v_LBKSC), None, None)
    np.testing.assert_array_equal(read(q_BTHC, filled, layer, index_BT, jnp.int32(slots)), found)


def test_scores_of_a_long_cache_never_exist_at_once():
    tokens, slots = 4096, 32768
    shapes = jax.eval_shape(functools.partial(arrays, tokens, slots, 1))
    index_BT = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    program = jax.jit(cached_attention).lower(*shapes, index_BT).compile()
    scores = HEADS * tokens * slots * 4
    assert program.memory_analysis().temp_size_in_bytes < scores / 40


def test_parts_of_the_keys_are_merged():
    q_BTHC, k_BSKC, v_BSKC = arrays(3, 10)
    nothing = jnp.zeros(q_BTHC.shape), jnp.full((2, HEADS, 3), -jnp.inf)
    parts = [reference.attend(q_BTHC, k_BSKC[:, s], v_BSKC[:, s]) for s in (slice(4), slice(4, None))]
    out_BTHC, _ = functools.reduce(merged, parts, nothing)
    np.testing.assert_allclose(out_BTHC, attend(q_BTHC, k_BSKC, v_BSKC, None), atol=1e-6)
    np.testing.assert_array_equal(merged(nothing, nothing)[0], 0)


def test_a_cache_in_8_bits_holds_what_it_was_given_nearly():
    _, k_BSKC, v_BSKC = arrays(1, 12)
    cache = KVCache.empty(2, 2, 16, KV_HEADS, WIDTH, jnp.bfloat16, int8=True)
    index_BT = jnp.stack([jnp.arange(12), jnp.arange(4, 16)])
    cache = jax.jit(KVCache.write)(cache, 1, k_BSKC, v_BSKC, index_BT)
    for given, found in zip((k_BSKC, v_BSKC), cache.layer(1), strict=True):
        kept = jnp.take_along_axis(found.astype(jnp.float32), index_BT[..., None, None], axis=1)
        largest = jnp.abs(given).max(-1, keepdims=True)
        assert (jnp.abs(kept - given) <= largest * (0.5 / 127 + 2**-7)).all(), "of 8 bits, and of bfloat16"
    for whole, block in zip(cache.layer(1), cache.block(1, 5, 6), strict=True):
        np.testing.assert_array_equal(block, whole[:, 5:11])
    assert not any(x[0].any() for x in jax.tree.leaves(cache)), "the other layer is empty"
    wide = [KVCache.empty(1, 1, 64, 1, 128, jnp.bfloat16, int8) for int8 in (True, False)]
    small, large = (sum(x.nbytes for x in jax.tree.leaves(one)) for one in wide)
    assert small <= 0.55 * large


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=1, context=2, tensor=2)], ids=["alone", "over a mesh"])
def test_the_kernels_write_and_read_a_cache_as_xla_does(monkeypatch, tokens, mesh):
    """One row is new, one goes on, one has padding behind its tokens, and one has no token."""
    keys = jax.random.split(jax.random.key(1), 4)
    q_BTHC, k_BTKC, v_BTKC = (
        jax.random.normal(key, (4, tokens, n, 128)) for key, n in zip(keys, (4, 2, 2), strict=False)
    )
    start_B, count_B = jnp.array([0, 150, 200, 70]), jnp.minimum(jnp.array([20, 20, 13, 0]), tokens)
    place_BT = start_B[:, None] + jnp.arange(tokens)
    real_BT = jnp.arange(tokens) < count_B[:, None]
    index_BT = jnp.where(real_BT, place_BT, 256 + jnp.arange(tokens))
    tables = rotation(place_BT, frequencies(128, 1e4))
    k_LBKSC, v_LBKSC = jax.random.normal(keys[3], (2, 2, 4, 2, 256, 128))

    def read(q_BTHC, k_BTKC, v_BTKC):
        cache = KVCache(k_LBKSC, v_LBKSC, None, None)
        return appended_attention(q_BTHC, k_BTKC, v_BTKC, tables, cache, jnp.int32(1), index_BT, jnp.int32(213))

    (wanted, wanted_cache) = jax.jit(read)(q_BTHC, k_BTKC, v_BTKC)
    monkeypatch.setattr(module, "cache_backend", lambda *_: "tpu_interpret")
    with jax.set_mesh(make_mesh(mesh)) if mesh else contextlib.nullcontext():
        found, cache = jax.jit(lambda *qkv: read(*qkv))(q_BTHC, k_BTKC, v_BTKC)
    np.testing.assert_allclose(found[real_BT], wanted[real_BT], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, cache, wanted_cache)


def test_caches_on_a_tpu_go_to_the_kernels_where_these_can_read_them_as_they_lie(monkeypatch):
    monkeypatch.setattr(module, "platform", lambda: "tpu")

    def backend(width=128, slots=1024, int8=False, tensor=1):
        def choose():
            cache = KVCache.empty(1, 8, slots, 2, width, jnp.bfloat16, int8)
            found.append(module.cache_backend(jnp.zeros((8, 1, 4, width), jnp.bfloat16), cache))

        found = []
        with jax.set_mesh(make_mesh(MeshConfig(data=8 // tensor, fsdp=1, tensor=tensor))):
            jax.eval_shape(choose)
        return found[0]

    assert backend() == backend(tensor=2) == "tpu"
    assert not any((backend(width=64), backend(slots=1000), backend(int8=True), backend(tensor=4)))
