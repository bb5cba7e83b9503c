"""Every backend of causal attention that runs here against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import causal_attention, rotary_tables
from kernels_pallas.causal_attention import blocks, tpu
from kernels_pallas.causal_attention.blocks import Blocks
from kernels_pallas.causal_attention.problem import Inputs, Problem, meeting
from tests.kernels_pallas import exact

TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
KERNELS = ["tpu_interpret", "gpu_interpret", *(["gpu"] if jax.default_backend() == "gpu" else [])]


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    """So that short rows have several blocks, and a turn of the loop several of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FORWARD", "BACKWARD"):
            patch.setattr(blocks, name, (Blocks(256, 2, keys=128, part=128, together=2),))
        yield


def draw(seed, batch, length, heads, kv_heads, width, dtype="float32", prefixed=False, size=1.0):
    """A call's arrays and bool [B, T, T] of who sees whom; segments of any length, out of order, padding between."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) * size, dtype)  # noqa: E731 - short, and used here alone
    arrays = {name: normal(batch, length, n, width) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
    arrays["positions"] = jnp.asarray(rng.integers(0, 32768, (batch, length)))  # they may repeat and fall
    cuts = np.sort(rng.integers(0, length + 1, (batch, 4)), axis=1)
    run = (np.arange(length) >= cuts[:, :, None]).sum(1)
    segments = np.stack([rng.permutation(5)[row] for row in run])  # 0 is padding
    arrays["segments"] = jnp.asarray(segments)
    earlier = np.tril(np.ones((length, length), bool))
    seen = segments[:, :, None] == segments[:, None]
    if prefixed:
        prefix = np.where(rng.random((batch, length)) < 0.8, rng.integers(0, 5, (batch, 1)), 0)
        arrays["prefix"] = jnp.asarray(prefix)
        seen = seen | ((prefix[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0))
    return arrays, earlier & seen & (segments[:, None] > 0), normal(batch, length, heads, width), rng


def run(backend, arrays, do, dlse):
    others = {name: x for name, x in arrays.items() if name not in ("q", "k", "v")}

    def loss(qkv):
        o, lse = causal_attention(*qkv, **others, return_lse=True, implementation=backend)
        return jnp.sum(o.astype(jnp.float32) * do) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * dlse), (o, lse)

    qkv = arrays["q"], arrays["k"], arrays["v"]
    (_, (o, lse)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return o, lse, gradients


def compare(backend, arrays, allowed, do, rng, tolerance):
    dlse = jnp.asarray(rng.normal(size=(do.shape[0], do.shape[2], do.shape[1])), jnp.float32)
    o, lse, gradients = run(backend, arrays, do, dlse)
    ids = np.asarray(arrays["positions"])
    want_o, want_lse, want = exact.attention(
        arrays["q"], arrays["k"], arrays["v"], do, np.asarray(dlse), q_pos=ids, k_pos=ids, theta=1e6, allowed=allowed
    )
    some = allowed.any(-1)
    np.testing.assert_array_equal(np.isfinite(lse), np.broadcast_to(some[:, None], lse.shape))
    finite = (np.where(some[:, None], x, 0) for x in (lse, want_lse))
    np.testing.assert_allclose(*finite, atol=tolerance * 3, rtol=tolerance)
    for name, got, expected in zip(("o", "dq", "dk", "dv"), (o, *gradients), (want_o, *want), strict=True):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, expected, atol=tolerance * max(1, np.abs(expected).max()), err_msg=name)
        assert not got[~some].any(), f"{name} of padding must be zero"


SHAPES = {
    "batch": st.integers(1, 2),
    "length": st.integers(1, 700),
    "heads": st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    "width": st.sampled_from([64, 80, 128]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "prefixed": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def check(backend, batch, length, heads, width, dtype, prefixed, seed):
    compare(backend, *draw(seed, batch, length, *heads, width, dtype, prefixed), TOLERANCE[dtype])


@settings(max_examples=4, deadline=None, derandomize=True)
@given(**SHAPES)
def test_any_row_agrees_with_float64_in_plain_jax(**case):
    check("xla", **case)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "length, heads, dtype, prefixed", [(700, (4, 2), "float32", True), (300, (3, 1), "bfloat16", False)]
)
def test_a_row_agrees_with_float64_in_the_kernel(backend, length, heads, dtype, prefixed):
    check(backend, 1, length, heads, 128, dtype, prefixed, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=8, deadline=None)  # others in each run
@given(**SHAPES)
def test_many_rows_agree_with_float64_in_the_kernel(backend, **case):
    check(backend, **case)


@pytest.mark.parametrize("backend", KERNELS)
def test_scores_far_beyond_those_of_the_diagonal_are_computed_with_a_running_maximum(backend):
    arrays, allowed, do, rng = draw(0, 1, 400, 2, 1, 128)
    arrays["segments"] = jnp.ones((1, 400), jnp.int32)
    arrays["k"] *= jnp.where(jnp.arange(400) < 100, 100.0, 0.01)[None, :, None, None]
    compare(backend, arrays, np.tril(np.ones((1, 400, 400), bool)), do, rng, 2e-4)


@pytest.mark.parametrize("backend", KERNELS)
def test_blocks_of_other_segments_are_never_read(backend):
    arrays, _, do, _ = draw(1, 1, 768, 2, 1, 64)
    arrays["segments"] = jnp.asarray(np.repeat([1, 2, 3], 256)[None])
    dlse = jnp.zeros((1, 2, 768))
    clean = run(backend, arrays, do, dlse)
    holed = arrays | {name: arrays[name].at[:, 256:512].set(jnp.nan) for name in "qkv"}
    other = jnp.r_[0:256, 512:768]
    for got, want in zip(jax.tree.leaves(run(backend, holed, do, dlse)), jax.tree.leaves(clean), strict=True):
        axis = 1 if got.ndim == 4 else 2
        np.testing.assert_array_equal(jnp.take(got, other, axis), jnp.take(want, other, axis))


@pytest.mark.parametrize("backend", KERNELS)
def test_blocks_of_other_answers_are_never_read(backend):
    arrays, *_ = draw(1, 1, 1024, 2, 1, 64)
    arrays["segments"] = jnp.asarray(np.repeat([1, 2, 3, 4], 256)[None])
    arrays["prefix"] = jnp.where(arrays["segments"] > 1, 1, 0)
    holed = arrays | {name: arrays[name].at[:, 256:768].set(jnp.nan) for name in "qkv"}
    other = jnp.r_[0:256, 768:1024]
    got, want = (jax.jit(functools.partial(causal_attention, implementation=backend))(**x) for x in (holed, arrays))
    np.testing.assert_array_equal(got[:, other], want[:, other])


def test_a_block_of_rows_lists_the_blocks_in_its_reach():
    """Rows of 256 in blocks of 64 keys: of the second sample, its own alone; of an answer, those of the prompt, too."""
    prompt, one, two = [1] * 200, [2] * 120, [3] * 192
    segments = jnp.array([prompt + one + two + [0] * 256])
    listed = lambda met, n: np.asarray(met.tiles[0]).reshape(3, -1)[n, : met.counts[0, n]].tolist()  # noqa: E731 - short, and used here alone
    packed = meeting(segments, None, 256, 64)
    assert packed.counts.tolist() == [[0, 1, -1]]
    assert listed(packed, 1) == [3]  # tokens 192 to 255 are of samples 1 and 2
    group = meeting(segments, jnp.where(segments > 1, 1, 0), 256, 64)
    assert listed(group, 1) == [0, 1, 2, 3] and group.counts[0, 2] == -1


def test_as_much_is_listed_as_the_samples_need():
    lengths = [500, 1700, 300, 1596]
    segments = jnp.asarray(np.repeat(np.arange(1, 5), lengths)[None])
    met = meeting(segments, None, 256, 256)
    visited = (int(met.counts.sum()) + 16) * 256**2  # and the diagonal
    useful = sum(n * (n + 1) / 2 for n in lengths)
    edges = sum(n * 256 * 1.5 + 256**2 for n in lengths)  # a diagonal, and two blocks cut at the ends
    assert useful < visited <= useful + edges


@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_tables_give_what_positions_give(backend):
    arrays, _, do, _ = draw(2, 1, 100, 2, 1, 80)
    dlse = jnp.zeros((1, 2, 100))
    by_tables = arrays | {"positions": rotary_tables(arrays["positions"], 1e6, 80)}
    for a, b in zip(*(jax.tree.leaves(run(backend, x, do, dlse)) for x in (arrays, by_tables)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_nothing_is_turned_without_positions(backend):
    arrays, allowed, *_ = draw(4, 1, 100, 2, 2, 64)
    del arrays["positions"]
    read = lambda name: jax.jit(functools.partial(causal_attention, implementation=name))(**arrays)  # noqa: E731 - short, and used here alone
    np.testing.assert_allclose(read(backend), read("xla"), atol=3e-6)


def test_heads_of_a_step_are_whole_groups_or_an_even_part_of_one():
    cases = {(8, 32, 8): (8, 2), (8, 28, 4): (7, 1), (1, 28, 4): (7, 1), (4, 16, 16): (4, 4), (4, 48, 4): (6, 1)}
    assert {case: blocks.heads_a_step(*case) for case in cases} == cases


def test_rows_that_vmem_cannot_hold_are_named():
    q, k = (jax.ShapeDtypeStruct((1, 2**18, heads, 128), jnp.bfloat16) for heads in (4, 1))
    assert "VMEM cannot hold the keys and values of a row of 262144" in tpu.unsupported(Problem(), Inputs(q, k, k))


WRONG = {
    "v must have k's shape": {"v": jnp.zeros((1, 4, 1, 64))},
    "multiple of kv heads": {"q": jnp.zeros((1, 4, 3, 64))},
    "share one floating type": {"k": jnp.zeros((1, 4, 2, 64), jnp.bfloat16)},
    r"k must be \[1, 4, kv_heads, 64\]": {"k": jnp.zeros((1, 5, 2, 64))},
    "segments must be integers of shape": {"segments": jnp.zeros((1, 5), int)},
    "segments must be given": {"prefix": jnp.zeros((1, 4), int)},
    "cannot serve: implementation must be one of": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    right = {name: jnp.zeros((1, 4, 2, 64)) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message):
        causal_attention(**right | WRONG[message])
