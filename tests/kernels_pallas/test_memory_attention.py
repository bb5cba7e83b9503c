"""Every backend that runs here against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import TileGrid, memory_attention, raster_positions, rotary_tables
from kernels_pallas.memory_attention import blocks
from tests.kernels_pallas import exact

TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2}
KERNELS = ["tpu_interpret", "gpu_interpret", *(["gpu"] if jax.default_backend() == "gpu" else [])]


def draw(seed, batch, t, m, heads, kv_heads, width, dtype, segments, limit, num_valid, furthest=32768, size=1.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * size, dtype)

    arrays = {
        "q": normal(batch, t, heads, width),
        "k": normal(batch, m, kv_heads, width),
        "v": normal(batch, m, kv_heads, width),
    }
    arrays["q_pos"], arrays["k_pos"] = (jnp.asarray(rng.integers(0, furthest, (batch, n))) for n in (t, m))
    allowed = np.ones((batch, t, m), bool)
    if segments:  # some queries meet no slot, some slots no query; 0 is padding
        q_segments, k_segments = np.sort(rng.integers(0, 5, (batch, t))), np.sort(rng.integers(0, 4, (batch, m)))
        allowed &= (q_segments[:, :, None] == k_segments[:, None]) & (k_segments[:, None] > 0)
        arrays |= {"q_segments": jnp.asarray(q_segments), "k_segments": jnp.asarray(k_segments)}
    if limit:
        limits = rng.integers(0, m + 1, (batch, t))
        allowed &= np.arange(m) < limits[..., None]
        arrays["limit"] = jnp.asarray(limits)
    if num_valid:
        count = rng.choice([0, 1, m], batch)
        allowed &= np.arange(m) < count[:, None, None]
        arrays["num_valid"] = jnp.asarray(count)
    return arrays, allowed, normal(batch, t, heads, width), jnp.asarray(rng.normal(size=(batch, heads, t)), jnp.float32)


def run(backend, arrays, do, dlse, theta=1e6, **options):
    def loss(qkv):
        o, lse = memory_attention(*qkv, **others, theta=theta, return_lse=True, implementation=backend, **options)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(o.astype(jnp.float32) * do) + jnp.sum(finite * dlse), (o, lse)

    others = {name: x for name, x in arrays.items() if name not in ("q", "k", "v")}
    qkv = arrays["q"], arrays["k"], arrays["v"]
    (_, (o, lse)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
    return o, lse, gradients


def compare(backend, arrays, allowed, do, dlse, tolerance, turned=True):
    given = arrays if turned else {name: x for name, x in arrays.items() if not name.endswith("_pos")}
    o, lse, gradients = run(backend, given, do, dlse)
    q_pos, k_pos = (np.asarray(arrays[name]) for name in ("q_pos", "k_pos"))
    qkv = (arrays[name] for name in ("q", "k", "v"))
    want_o, want_lse, want = exact.attention(
        *qkv, do, np.asarray(dlse), q_pos=q_pos, k_pos=k_pos, theta=1e6, allowed=allowed
    )
    some = allowed.any(-1)
    np.testing.assert_array_equal(np.isfinite(lse), np.broadcast_to(some[:, None], lse.shape))
    np.testing.assert_allclose(
        np.where(some[:, None], lse, 0), np.where(some[:, None], want_lse, 0), atol=tolerance * 3, rtol=tolerance
    )
    for name, got, expected in zip(("o", "dq", "dk", "dv"), (o, *gradients), (want_o, *want), strict=True):
        got = np.asarray(got, np.float64)
        np.testing.assert_allclose(got, expected, atol=tolerance * max(1, np.abs(expected).max()), err_msg=name)
    for name, got in (("o", o), ("dq", gradients[0])):  # exactly, not nearly
        assert not np.asarray(got, np.float32)[~some].any(), f"{name} of queries without memory must be zero"


SHAPES = {
    "batch": st.integers(1, 2),
    "t": st.integers(1, 150),
    "m": st.integers(1, 300),
    "heads": st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    "width": st.sampled_from([64, 80, 128]),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "masks": st.tuples(st.booleans(), st.booleans(), st.booleans()),
    "seed": st.integers(0, 2**31),
}


def check(backend, batch, t, m, heads, width, dtype, masks, seed):
    case = draw(seed, batch, t, m, *heads, width, dtype, *masks)
    compare(backend, *case, TOLERANCE[dtype])


@settings(max_examples=4, deadline=None, derandomize=True)
@given(**SHAPES)
def test_any_shape_agrees_with_float64_in_plain_jax(**case):
    check("xla", **case)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(**SHAPES)
def test_any_shape_agrees_with_float64_in_the_kernel(backend, **case):
    check(backend, **case)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=6, deadline=None)  # others in each run
@given(**SHAPES)
def test_many_shapes_agree_with_float64_in_the_kernel(backend, **case):
    check(backend, **case)


@pytest.mark.parametrize("backend", KERNELS)
def test_scores_far_beyond_the_first_slots_are_computed_with_a_running_maximum(backend):
    arrays, allowed, do, dlse = draw(0, 1, 20, 1100, 1, 1, 128, "float32", False, False, False)
    # slots after the first chunk score hundreds higher (or lower) than those that anchor the rows
    scale = jnp.where(jnp.arange(1100) < blocks.forward(20, 1100).slots, 0.01, 100.0)[None, :, None, None]
    arrays["k"] = arrays["k"] * scale
    compare(backend, arrays, allowed, do, dlse, 2e-4)


def test_blocks_fit_the_number_of_queries():
    # the patches of a tile, 1025, in blocks of 384 rows, so that 127 are padding and not 1023
    assert blocks.forward(1025, 1152).q == 1152 and blocks.backward(1025, 1152).q == 1152
    arrays, allowed, do, dlse = draw(4, 1, 1025, 1025, 1, 1, 64, "float32", False, True, False)
    compare("tpu_interpret", arrays, allowed, do, dlse, 3e-6)


def test_a_block_that_reaches_few_slots_skips_the_others():
    arrays, allowed, do, dlse = draw(3, 1, 300, 1200, 1, 1, 128, "float32", False, False, False)
    q_segments = np.where(np.arange(300) < 250, 7, 9)[None]
    k_segments = np.where(np.arange(1200) < 100, 7, np.where(np.arange(1200) > 1150, 9, 3))[None]
    arrays |= {"q_segments": jnp.asarray(q_segments), "k_segments": jnp.asarray(k_segments)}
    arrays["v"] = arrays["v"].at[:, 600:700].set(jnp.nan)  # nobody may touch a chunk out of reach
    arrays["v"] = jnp.where(jnp.isnan(arrays["v"]), 0.0, arrays["v"])
    compare("tpu_interpret", arrays, q_segments[..., None] == k_segments[:, None], do, dlse, 3e-6)


@pytest.mark.parametrize(("heads", "width", "masked"), [(4, 64, False), (4, 64, True), (4, 32, True), (3, 64, False)])
def test_narrow_heads_that_are_not_turned_share_the_lanes(heads, width, masked):
    together = {(4, 64): 2, (4, 32): 4, (3, 64): 1}
    assert blocks.heads_together(heads, width) == together[heads, width]
    case = draw(6, 2, 140, 150, heads, heads, width, "float32", masked, masked, False, furthest=1)
    compare("tpu_interpret", *case, TOLERANCE["float32"], turned=False)


@pytest.mark.parametrize("chip", ["v5e", "v5p"])  # whose two cores share the queries of three heads
def test_only_the_first_slots_of_each_row_are_in_use(chip):
    arrays, *_, do, dlse = draw(9, 4, 700, 1100, 3, 3, 128, "float32", False, False, False)
    arrays["num_valid"] = count = jnp.array([1100, 1025, 300, 0])
    assert blocks.forward(700, 1100, chip, units=3).q == (768 if chip == "v5e" else 384)
    arrays = {name: x for name, x in arrays.items() if not name.endswith("_pos")}
    for name in ("k", "v"):  # what is never read may be anything
        arrays[name] = arrays[name].at[2:, 512:].set(jnp.nan)
    o, lse, _ = run("tpu_interpret", arrays, do, dlse, chip=chip)
    clean = {name: jnp.nan_to_num(x) for name, x in arrays.items()}
    want_o, want_lse, _ = run("xla", clean, do, dlse)
    np.testing.assert_allclose(o, want_o, atol=3e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    assert np.isneginf(lse[3]).all() and not np.asarray(o[3]).any() and count[3] == 0


def test_narrow_heads_share_the_lanes_with_a_running_maximum():
    arrays, allowed, do, dlse = draw(0, 1, 20, 1100, 2, 2, 64, "float32", False, False, False, furthest=1)
    arrays["k"] *= jnp.where(jnp.arange(1100) < blocks.forward(20, 1100).slots, 0.01, 100.0)[None, :, None, None]
    compare("tpu_interpret", arrays, allowed, do, dlse, 2e-4, turned=False)


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_tables_give_what_positions_give(backend):
    arrays, _, do, dlse = draw(1, 1, 33, 70, 2, 1, 80, "float32", True, False, False)
    made = {name: rotary_tables(arrays[name], 1e6, 80) for name in ("q_pos", "k_pos")}
    for a, b in zip(
        jax.tree.leaves(run(backend, arrays, do, dlse)),
        jax.tree.leaves(run(backend, arrays | made, do, dlse)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_tile_grid_stands_in_for_the_positions_of_its_tokens():
    arrays, _, do, dlse = draw(8, 2, 9, 7 * 16, 1, 1, 64, "float32", False, False, True, furthest=50)
    grid, base = jnp.array([[2, 3], [1, 1]]), jnp.array([4, 0])
    arrays["k_pos"] = raster_positions(grid, tiles=7, side=4, base=base)
    by_grid = arrays | {"k_pos": TileGrid(grid, base, side=4)}
    for a, b in zip(*(jax.tree.leaves(run("xla", x, do, dlse)) for x in (arrays, by_grid)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(("t", "heads"), [(1, (4, 4)), (3, (4, 1)), (16, (2, 2))])
def test_decoding_reads_turned_keys(backend, t, heads):
    arrays, *_ = draw(2, 2, t, 200, *heads, 128, "float32", False, False, True)
    turned = jnp.asarray(exact.turn(np.asarray(arrays["k"], np.float64), np.asarray(arrays["k_pos"]), 1e6), jnp.float32)
    whole = jax.jit(functools.partial(memory_attention, return_lse=True, implementation="xla"))(**arrays)
    cached = {name: x for name, x in arrays.items() if name != "k_pos"} | {"k": turned}
    cached["q_pos"] = rotary_tables(arrays["q_pos"], 1e6, 128)
    read = jax.jit(functools.partial(memory_attention, k_rotated=True, return_lse=True, implementation=backend))
    for got, want in zip(read(**cached), whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_the_gpu_kernels_leave_blocks_out_of_reach_unread():
    arrays, _, do, dlse = draw(3, 1, 128, 300, 1, 1, 64, "float32", False, False, False)
    query, slot = np.arange(128), np.arange(300)
    q_segments = np.where(query < 64, 7, np.where(query < 96, 9, 0))[None]  # the last queries meet nothing
    k_segments = np.where(slot < 128, 7, np.where(slot < 192, 8, 9))[None]
    arrays |= {"q_segments": jnp.asarray(q_segments), "k_segments": jnp.asarray(k_segments)}
    clean = run("xla", arrays, do, dlse)
    arrays |= {name: arrays[name].at[:, 128:192].set(jnp.nan) for name in ("k", "v")}
    for got, want in zip(jax.tree.leaves(run("gpu_interpret", arrays, do, dlse)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_memory_beyond_what_a_call_holds_is_merged(monkeypatch):
    monkeypatch.setattr(blocks, "MAX_SLOTS", 256)
    case = draw(5, 1, 40, 700, 2, 1, 128, "float32", True, True, False)
    compare("tpu_interpret", *case, 3e-6)


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_gate_scales_and_learns_from_zero(backend):
    arrays, _, do, _ = draw(4, 1, 8, 30, 1, 1, 64, "float32", False, False, False)

    def loss(gate):
        return jnp.sum(memory_attention(**arrays, gate=gate, implementation=backend) * do)

    plain = jnp.sum(memory_attention(**arrays, implementation="xla") * do)
    value, slope = jax.value_and_grad(loss)(jnp.zeros(1))
    assert value == 0
    np.testing.assert_allclose(slope[0], plain, rtol=1e-4)  # tanh'(0) = 1


WRONG = {
    "v must have k's shape": {"v": jnp.zeros((1, 5, 2, 64))},
    "multiple of kv heads": {"q": jnp.zeros((1, 4, 3, 64))},
    "share one floating type": {"k": jnp.zeros((1, 6, 2, 64), jnp.bfloat16)},
    "given together": {"q_pos": jnp.zeros((1, 4), jnp.int32)},
    "k_segments must be integers": {"q_segments": jnp.zeros((1, 4), jnp.int32), "k_segments": jnp.zeros((1, 6))},
    "num_valid must be integers of shape": {"num_valid": jnp.zeros((2,), jnp.int32)},
    "whole tiles of 4": {"q_pos": jnp.zeros((1, 4), int), "k_pos": TileGrid(jnp.ones((1, 2), int), side=4)},
    r"k_pos.grid must be integers \(1, 2\)": {
        "q_pos": jnp.zeros((1, 4), int),
        "k_pos": TileGrid(jnp.ones((1, 3), int)),
    },
    "cannot serve: implementation must be one of": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    right = {"q": jnp.zeros((1, 4, 2, 64)), "k": jnp.zeros((1, 6, 2, 64)), "v": jnp.zeros((1, 6, 2, 64))}
    with pytest.raises(ValueError, match=message):
        memory_attention(**right | WRONG[message])


@pytest.mark.parametrize(("backend", "most"), [("tpu_interpret", 128), ("gpu_interpret", 256)])
def test_a_head_dim_that_no_kernel_serves_is_named(backend, most):
    wide = {name: jnp.zeros((1, 4, 2, 2 * most)) for name in "qkv"}
    with pytest.raises(ValueError, match=f"head dim must be even and at most {most}, got {2 * most}"):
        memory_attention(**wide, implementation=backend)
