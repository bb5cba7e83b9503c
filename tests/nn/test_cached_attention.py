"""Attention of tokens that are appended to a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.nn import attention
from vlmem_jax.nn.attention import attend, cached_attention, filled_attention, merged
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
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
    found = jax.jit(cached_attention)(q_BTHC, k_BSKC, v_BSKC, index_BT)
    inside = np.asarray(index_BT < slots)
    np.testing.assert_allclose(found[inside], expected[inside], atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_that_nobody_fills_are_not_read_and_change_no_bit(monkeypatch, tokens):
    """Not even where they hold what is not a number."""
    slots, layer = 61, jnp.int32(1)
    monkeypatch.setattr(attention, "CACHE_BLOCK", 8)
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
    parts = [attention.reference.attend(q_BTHC, k_BSKC[:, s], v_BSKC[:, s]) for s in (slice(4), slice(4, None))]
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
