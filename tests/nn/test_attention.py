"""Causal attention of packed samples: what XLA computes, and JAX's kernels for accelerators against it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import device
from vlmem_jax.nn import attention, seen_blocks
from vlmem_jax.nn.attention import (
    AttentionConfig,
    attend,
    bank_attention,
    bank_parts,
    causal_attention,
    full_attention,
    same_segment,
    segment_attention,
    window_attention,
)
from vlmem_jax.nn.rope import frequencies, rotation
from vlmem_jax.nn.stack import remat
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

PACKED = ["tpu_interpret", "gpu_interpret"]


def inputs(B=1, T=256, H=4, K=2, C=128, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, C)), jnp.float32) for n in (H, K, K))
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], T // 4)[None].repeat(B, 0), jnp.int32)
    return q, k, v, segments


def test_attend_is_softmax_attention_with_grouped_heads():
    q, k, v, _ = (np.asarray(x, np.float64) for x in inputs(B=2, T=8, C=4))
    allowed = np.random.default_rng(0).random((2, 8, 8)) < 0.5
    allowed[:, :, 0] = True
    out = np.asarray(jax.jit(attend)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(allowed)))
    for b, t, h in np.ndindex(2, 8, 4):
        scores = np.where(allowed[b, t], k[b, :, h // 2] @ q[b, t, h] / 2, -np.inf)
        weights = np.exp(scores - scores.max())
        wanted = weights @ v[b, :, h // 2] / weights.sum()
        np.testing.assert_allclose(out[b, t, h], wanted, atol=1e-5)


def test_gradients_are_those_of_plain_softmax():
    q, k, v, segments = inputs(T=16, C=8)
    allowed = same_segment(segments, segments)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("bthc,bshc->bhts", q, k) / jnp.sqrt(8.0) + jnp.where(allowed, 0, -1e30)[:, None]
        return jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores), v)

    def scalar(attention):
        return jax.jit(jax.grad(lambda *x: (attention(*x)[:, :12] ** 2).sum(), argnums=(0, 1, 2)))

    ours, theirs = scalar(lambda *x: attend(*x, allowed))(q, k, v), scalar(plain)(q, k, v)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, theirs)


def test_a_token_sees_no_later_one_and_no_other_sample():
    q, k, v, segments = map(np.array, inputs(T=16, C=8))
    read = jax.jit(causal_attention)
    out = np.asarray(read(q, k, v, segments))
    for x in (k, v):
        x[:, 6] += 1  # third token of sample 2
    changed = np.asarray(read(q, k, v, segments))
    real = slice(0, 12)  # padding follows
    moved = np.flatnonzero(np.abs(out - changed)[0, real].max(axis=(-1, -2)))
    assert moved.tolist() == [6, 7]


def test_the_tpu_kernel_computes_the_same(monkeypatch):
    q, k, v, segments = inputs()
    make = attention.splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(
        attention.splash_attention, "make_splash_mha_single_device", lambda *a, **b: make(*a, **b, interpret=True)
    )
    out, plain = (np.asarray(jax.jit(f)(q, k, v, segments)) for f in (attention._splash_attention, causal_attention))
    real = np.asarray(segments[0]) > 0
    np.testing.assert_allclose(out[0, real], plain[0, real], atol=1e-4)


def turned_inputs(B, T):
    """q, k, v and segments, and tables of positions that differ from row to row."""
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 99, (B, T)))
    return *inputs(B=B, T=T, C=64), rotation(positions, frequencies(64, 1e4))


def value_and_gradients(q, k, v, segments, tables):
    """Of a new function each time, so that what was patched is seen."""

    def scalar(*qkv):
        out = causal_attention(*qkv, segments, tables)
        return (out**2).sum(), out

    gradients, out = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


@pytest.mark.parametrize("backend", PACKED)
def test_the_kernel_for_packed_rows_turns_and_reads_as_plain_jax_does(packed_kernel, backend):
    given = turned_inputs(1, 300)
    plain = value_and_gradients(*given)
    packed_kernel(backend)
    ours = value_and_gradients(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), ours, plain)


@pytest.mark.parametrize("backend", PACKED)
def test_the_kernel_for_packed_rows_gets_whole_rows_of_some_heads(packed_kernel, backend):
    given = turned_inputs(2, 128)
    plain = value_and_gradients(*given)
    packed_kernel(backend)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))):
        ours = jax.device_get(value_and_gradients(*given))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), ours, plain)


@pytest.mark.parametrize("how", ["scores at once", "blocks that are seen", "the kernel of packed rows", "over a mesh"])
def test_answers_see_the_prompt_that_they_share_and_themselves(monkeypatch, how):
    """The second and third segment see the first; each gives what it gives behind a first of its own."""
    B, T, quarter = 2, 128, 32
    q, k, v, segments, tables = turned_inputs(B, T)
    prefix = jnp.where(segments > 1, 1, 0)
    real = np.asarray(segments[0]) > 0

    def shared(q, k, v):
        out = causal_attention(q, k, v, segments, tables, prefix)
        return (out[:, real] ** 2).sum(), out

    def alone(q, k, v):
        def answer(n):
            picked = np.r_[:quarter, n * quarter : (n + 1) * quarter]
            of = (x[:, picked] for x in (q, k, v))
            one = jnp.ones((B, len(picked)), jnp.int32)
            return causal_attention(*of, one, tuple(x[:, picked] for x in tables))

        first, second = answer(1), answer(2)
        out = jnp.concatenate([first, second[:, quarter:]], axis=1)
        return (out**2).sum(), out

    (_, wanted), wanted_gradients = jax.jit(jax.value_and_grad(alone, (0, 1, 2), has_aux=True))(q, k, v)
    if how == "blocks that are seen":
        monkeypatch.setattr(seen_blocks, "BLOCK", 48)  # 128 is no multiple of it
    if how == "the kernel of packed rows":
        monkeypatch.setattr(attention, "packed_backend", lambda *_: "tpu_interpret")
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 2))) if how == "over a mesh" else contextlib.nullcontext():
        (_, out), gradients = jax.jit(jax.value_and_grad(shared, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(out[:, real], wanted, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), gradients, wanted_gradients)


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_rows_go_to_the_kernel_for_packed_ones_while_the_chip_holds_them(monkeypatch, name):
    monkeypatch.setattr(device, "platform", lambda: name)
    found = []
    for T in (64, 1000, 16384, 2**20):
        q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (8, 2))
        jax.eval_shape(lambda *qk: found.append(attention.packed_backend(*qk)), q, k)
    assert found == [None, name, name, None if name == "tpu" else name]  # VMEM holds all keys of a row; a GPU, a block


@pytest.mark.parametrize("T", [128, 384, 1280, 2560, 6144])
def test_the_tpu_kernel_has_blocks_for_rows_of_any_length(T):
    q, k = (jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (2, 1))
    scalar = lambda *qkvs: attention._splash_attention(*qkvs).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.eval_shape(jax.grad(scalar, argnums=(0, 1, 2)), q, k, k, jax.ShapeDtypeStruct((1, T), jnp.int32))
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize("policy, kept", [("none", True), ("dots", True), ("full", False)])
def test_what_an_attention_kernel_gave_is_kept(capsys, policy, kept):
    q, k, v, segments = inputs(T=32, H=2, C=8)
    config = attention.AttentionConfig("tpu_interpret")
    tables = attention.kernels_pallas.rotary_tables(jnp.arange(32)[None], 1e4, 8)

    def read(q):
        return attention.memory_attention(config, q, k, v, tables, tables, segments, segments).sum()

    jax.ad_checkpoint.print_saved_residuals(remat(read, policy), q)
    assert ("memory_attention" in capsys.readouterr().out) == kept


@pytest.mark.parametrize(
    "implementation, T, longest",
    [("xla", 37, 8), ("xla", 5, 8), ("tpu_interpret", 37, 8), ("gpu_interpret", 37, 8)],
)
def test_windows_of_neighbours_need_no_more_than_neighbouring_runs(monkeypatch, implementation, T, longest):
    """As among all keys of the row with the same segments; padding, in between and at the end, gives zero."""
    monkeypatch.setattr(attention, "KERNEL_KEYS", 28)  # runs of 12
    rng = np.random.default_rng(T)
    lengths = rng.integers(1, longest + 1, T)
    segments = jnp.asarray(np.repeat(np.arange(1, T + 1), lengths)[:T][None].repeat(2, 0), jnp.int32)
    segments = segments.at[:, -2:].set(0).at[:, 3].set(0)
    q, k, v = (jax.random.normal(key, (2, T, 4, 8)) for key in jax.random.split(jax.random.key(0), 3))

    def windows(*x):
        return window_attention(AttentionConfig(implementation), *x, segments, longest)

    def whole_rows(*x):
        return segment_attention(AttentionConfig("xla"), *x, segments)

    def run(call):
        def scalar(*x):
            out = call(*x)
            return (out**2).sum(), out

        gradients, out = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        return out, gradients

    (near, ours), (whole, theirs) = run(windows), run(whole_rows)
    np.testing.assert_allclose(near, whole, atol=1e-5)
    np.testing.assert_array_equal(near[:, -2:], 0)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("length", [20, 17])
def test_long_rows_are_read_by_blocks_of_queries(monkeypatch, length):
    q, k, v, _ = inputs(B=2, T=20, C=8)
    whole = full_attention(AttentionConfig(), q, k, v, length)
    np.testing.assert_allclose(whole, attend(q, k[:, :length], v[:, :length], None), atol=1e-6)
    monkeypatch.setattr(attention, "LONG", 16)
    monkeypatch.setattr(attention, "BLOCK", 8)
    scores = []
    monkeypatch.setattr(
        attention, "attend", lambda q, k, *rest: scores.append((q.shape, k.shape)) or attend(q, k, *rest)
    )
    np.testing.assert_allclose(full_attention(AttentionConfig(), q, k, v, length), whole, atol=1e-6)
    assert {(q_shape[1], k_shape[1]) for q_shape, k_shape in scores} == {(8, length)}


# --- banks ------------------------------------------------------------------------------------------------------------


def test_parts_of_a_bank_fit_the_kernel():
    assert bank_parts(32, 729) == (2, 11776) and bank_parts(8, 729) == (1, 5888)
    assert bank_parts(18, 729) == (2, 6656)  # nine entries each
    assert bank_parts(16, 1024) == (2, 8192)  # twelve of so many tokens at most
    assert bank_parts(0, 729)[0] == 0


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_a_bank_of_parts_is_read_as_one_memory(backend):
    """Rows whose second part is full, begun, and empty; the last row has nothing at all, and reads exactly zero."""
    B, X, M, H, C, T = 4, 2, 640, 2, 64, 20
    draw = np.random.default_rng(3).normal
    q, weights = (jnp.asarray(draw(size=(B, T, H, C)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(draw(size=(B, X, M, H * C)), jnp.float32) for _ in range(2))
    valid = jnp.array([[639, 639], [639, 5], [300, 0], [0, 0]], jnp.int32)

    def plainly(q, k, v):
        allowed = (jnp.arange(M) < valid[..., None]).reshape(B, 1, X * M)
        k, v = (x.reshape(B, X * M, H, C) for x in (k, v))
        return attend(q, k, v, jnp.broadcast_to(allowed, (B, T, X * M)))

    def by_parts(q, k, v):
        return bank_attention(AttentionConfig(backend), q, k, v, valid)

    def scalar(read):
        return jax.jit(jax.value_and_grad(lambda *x: ((out := read(*x)) * weights).sum() + (out**2).sum(), (0, 1, 2)))

    np.testing.assert_allclose(jax.jit(by_parts)(q, k, v), jax.jit(plainly)(q, k, v), atol=1e-5)
    assert not np.asarray(jax.jit(by_parts)(q, k, v))[3].any()
    ours, theirs = scalar(by_parts)(q, k, v), scalar(plainly)(q, k, v)
    for found, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-4)
