"""Every backend of attention over a cache that runs here against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import append_to_cache, cached_attention, rotary_tables
from kernels_pallas.cached_attention import blocks, tpu
from kernels_pallas.cached_attention.problem import Inputs, Problem, last_block
from tests.kernels_pallas import exact

TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
KERNELS = ["tpu_interpret"]
C = 128


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that short caches have several blocks, and few tokens, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "KEYS", (128,))
        patch.setattr(blocks, "MOST_ROWS", 64)
        yield


def draw(seed, batch, tokens, slots, heads, kv_heads, dtype="float32", turned=True, size=1.0):
    """A call's arrays: rows filled to any length, by any number of tokens, or none."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * size, dtype)  # noqa: E731 - short, and used here alone
    arrays = {"q": normal(batch, tokens, heads, C)}
    arrays |= {name: normal(2, batch, kv_heads, slots, C) for name in "kv"}
    count = rng.integers(0, min(tokens, slots) + 1, batch)
    arrays |= {
        "layer": jnp.int32(1),
        "count": jnp.asarray(count),
        "start": jnp.asarray(rng.integers(0, slots + 1 - count)),
    }
    if turned:
        arrays["positions"] = jnp.asarray(rng.integers(0, 32768, (batch, tokens)))
    return arrays


def compare(backend, arrays, tolerance):
    o = np.asarray(jax.jit(functools.partial(cached_attention, implementation=backend))(**arrays), np.float64)
    q, ids = arrays["q"], arrays.get("positions")
    k, v = (arrays[name][1].swapaxes(1, 2) for name in "kv")
    start, count, token = *(np.asarray(arrays[name])[:, None] for name in ("start", "count")), np.arange(q.shape[1])
    real = token < count
    allowed = (np.arange(k.shape[1]) <= (start + token)[..., None]) & real[..., None]
    nothing = np.zeros(q.shape), np.zeros((q.shape[0], q.shape[2], q.shape[1]))
    turn = None if ids is None else np.asarray(ids)
    expected, *_ = exact.attention(q, k, v, *nothing, q_pos=turn, k_pos=None, theta=1e6, allowed=allowed)
    np.testing.assert_allclose(o, expected, atol=tolerance * max(1, np.abs(expected).max()))
    assert not o[~real].any(), "what is no token must get zero"


SHAPES = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(1, 200),
    "slots": st.sampled_from([128, 384, 512]),
    "heads": st.sampled_from([(2, 2), (4, 2), (3, 1), (7, 1)]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "turned": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def check(backend, batch, tokens, slots, heads, dtype, turned, seed):
    compare(backend, draw(seed, batch, tokens, slots, *heads, dtype, turned), TOLERANCE[dtype])


@settings(max_examples=4, deadline=None, derandomize=True)
@given(**SHAPES)
def test_any_rows_agree_with_float64_in_plain_jax(**case):
    check("xla", **case)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "batch, tokens, heads, dtype, turned",
    [(3, 1, (4, 2), "float32", True), (3, 100, (3, 1), "float32", True), (2, 60, (4, 2), "bfloat16", False)],
)
def test_rows_agree_with_float64_in_the_kernel(backend, batch, tokens, heads, dtype, turned):
    check(backend, batch, tokens, 512, heads, dtype, turned, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=8, deadline=None)  # others in each run
@given(**SHAPES)
def test_many_rows_agree_with_float64_in_the_kernel(backend, **case):
    check(backend, **case)


@pytest.mark.parametrize("backend", KERNELS)
def test_scores_far_beyond_those_of_the_first_slots_are_computed_with_a_running_maximum(backend):
    arrays = draw(0, 1, 20, 512, 2, 1, size=10.0)
    arrays |= {"start": jnp.array([450]), "count": jnp.array([20])}
    arrays["k"] *= jnp.where(jnp.arange(512) < 200, 0.01, 10.0)[:, None]
    compare(backend, arrays, 2e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_blocks_behind_a_row_and_other_layers_are_never_read(backend):
    """Row 0 is filled to slot 119, row 1 to slot 359; the third has no tokens."""
    arrays = draw(1, 3, 20, 512, 2, 1)
    arrays |= {"start": jnp.array([100, 340, 512]), "count": jnp.array([20, 20, 0])}
    read = jax.jit(functools.partial(cached_attention, implementation=backend))
    clean = read(**arrays)
    unread = jnp.arange(512)[None, :] >= jnp.array([128, 384, 0])[:, None]
    holed = {
        n: arrays[n].at[0].set(jnp.nan).at[1].set(jnp.where(unread[:, None, :, None], jnp.nan, arrays[n][1]))
        for n in "kv"
    }
    np.testing.assert_array_equal(read(**arrays | holed), clean)
    assert clean[:2].any() and not clean[2].any()


def test_the_blocks_that_a_row_meets_follow_its_length():
    """Chunks of 512 in blocks of 256 queries over blocks of 1,024 keys; the last row has 100 tokens, the third none."""
    start, count = np.array([4096 - 512, 32768 - 512, 5000, 1000]), np.array([512, 512, 0, 100])
    met = [(last_block(start, count, first, 256, 1024)).tolist() for first in (0, 256)]
    assert [row[:2] + row[3:] for row in met] == [[3, 31, 1], [3, 31, 1]]
    assert last_block(np.array([1000]), np.array([20]), 0, 256, 1024).tolist() == [0], "up to slot 1,019"


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_tables_give_what_positions_give(backend):
    arrays = draw(2, 1, 10, 128, 2, 1)
    read = jax.jit(functools.partial(cached_attention, implementation=backend))
    by_tables = arrays | {"positions": rotary_tables(arrays["positions"], 1e6, C)}
    np.testing.assert_allclose(read(**by_tables), read(**arrays), atol=2e-5)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("tokens, slots, dtype", [(1, 256, "bfloat16"), (50, 128, "float32"), (300, 1024, "bfloat16")])
def test_new_keys_and_values_are_put_into_their_slots_and_nowhere_else(backend, tokens, slots, dtype):
    """Of a row some tokens fit, of another all are there, of the third none."""
    rng = np.random.default_rng(tokens)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731 - short, and used here alone
    cache, new = ([normal(*shape) for _ in "kv"] for shape in ((2, 3, 2, slots, C), (3, tokens, 2, C)))
    start, count = np.array([slots - 1 - tokens // 2, 37, slots]), np.array([tokens, tokens, 0])
    put = functools.partial(append_to_cache, layer=jnp.int32(1), implementation=backend)
    got = jax.jit(put)(tuple(cache), tuple(new), start=jnp.asarray(start), count=jnp.asarray(count))
    for before, tokens_BTKC, after in zip(cache, new, got, strict=True):
        expected = np.array(before)
        for row in range(3):
            fit = max(min(count[row], slots - start[row]), 0)
            expected[1, row, :, start[row] : start[row] + fit] = tokens_BTKC[row, :fit].swapaxes(0, 1)
        np.testing.assert_array_equal(after, expected)


def test_what_a_kernel_cannot_serve_is_named():
    def why(width=C, slots=1024, kind=jnp.bfloat16):
        k = jax.ShapeDtypeStruct((1, 1, 2, slots, width), kind)
        q = jax.ShapeDtypeStruct((1, 8, 4, width), jnp.bfloat16)
        return tpu.unsupported(Problem(), Inputs(q, k, k, None, None, None))

    assert why() is None
    assert "head dim must be 128" in why(width=64)
    assert "slots must be a multiple of 128, got 1000" in why(slots=1000)
    assert "got q bfloat16 and k int8" in why(kind=jnp.int8)


WRONG = {
    "v must have k's shape": {"v": jnp.zeros((1, 1, 2, 64, 128))},
    "multiple of kv heads": {"q": jnp.zeros((1, 4, 3, 128))},
    r"k must be \[layers, 1, kv_heads, slots, 128\]": {"k": jnp.zeros((1, 2, 2, 128, 128))},
    "start must be integers of shape": {"start": jnp.zeros(2, int)},
    "positions must be integers of shape": {"positions": jnp.zeros((1, 5), int)},
    "cannot serve: there is no gpu_interpret kernel": {"implementation": "gpu_interpret"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    right = {"q": jnp.zeros((1, 4, 2, C))} | {name: jnp.zeros((1, 1, 2, 128, C)) for name in "kv"}
    right |= {"layer": 0} | {name: jnp.zeros(1, int) for name in ("start", "count")}
    with pytest.raises(ValueError, match=message):
        cached_attention(**right | WRONG[message])


def test_a_cache_is_appended_to_by_the_kernel_for_it_alone():
    cache, new = (tuple(jnp.zeros(shape) for _ in "kv") for shape in ((1, 1, 1, 128, C), (1, 1, 1, C)))
    place = {"layer": 0, "start": jnp.zeros(1, int), "count": jnp.ones(1, int)}
    with pytest.raises(ValueError, match="implementation tpu or tpu_interpret, got 'xla'"):
        append_to_cache(cache, new, **place, implementation="xla")
