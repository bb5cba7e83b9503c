import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.train.loss import cross_entropy, log_probs, log_probs_where

B, T, D, V = 4, 13, 8, 37


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    return hidden, kernel, jax.random.randint(keys[2], (B, T), 0, V), jax.random.uniform(keys[3], (B, T))


def plain(hidden, kernel, targets, weights):
    """The loss written out, with all logits."""
    scores = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(weights * jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize("chunk", [1, 5, 13, 1000])
def test_value_and_gradients_do_not_depend_on_the_chunk(case, chunk):
    hidden, kernel, *rest = case
    got = jax.jit(jax.value_and_grad(lambda h, k: 3 * cross_entropy(h, k, *rest, chunk), (0, 1)))(hidden, kernel)
    expected = jax.jit(jax.value_and_grad(lambda h, k: 3 * plain(h, k, *rest), (0, 1)))(hidden, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


def products(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("dot_general")


def test_only_the_gradients_that_are_asked_for_are_computed(case):
    hidden, kernel, *rest = case
    loss = lambda h, k: cross_entropy(h, k, *rest, 13)  # noqa: E731
    assert products(loss, hidden, kernel) == 1
    assert products(jax.grad(loss, 0), hidden, kernel) == 2
    assert products(jax.grad(loss, (0, 1)), hidden, kernel) == 3


def test_all_logits_are_never_there_at_once(case):
    hidden, kernel, *rest = case
    text = str(jax.make_jaxpr(jax.grad(lambda h, k: cross_entropy(h, k, *rest, 4), (0, 1)))(hidden, kernel))
    assert f"f32[1,{B * 4},{V}]" in text
    assert f"{B},{T},{V}]" not in text and f",{B * 16},{V}]" not in text


def test_a_frozen_head_in_a_scan_under_remat_costs_no_gradient(case):
    hidden, kernel, *rest = case

    @jax.checkpoint
    def one(total, h):
        return total + cross_entropy(h, kernel, *rest, 13), None

    gradient = jax.grad(lambda h: jax.lax.scan(one, 0.0, h[None])[0])
    assert f"f32[1,{D},{V}]" not in str(jax.make_jaxpr(gradient)(hidden))
    expected = jax.grad(lambda h: plain(h, kernel, *rest))(hidden)
    np.testing.assert_allclose(gradient(hidden), expected, rtol=1e-5, atol=1e-5)


def test_bf16_states_give_an_fp32_gradient_of_the_fp32_kernel(case):
    hidden, kernel, *rest = case
    d_hidden, d_kernel = jax.grad(lambda h, k: cross_entropy(h, k, *rest, 4), (0, 1))(
        hidden.astype(jnp.bfloat16), kernel
    )
    assert d_hidden.dtype == jnp.bfloat16 and d_kernel.dtype == jnp.float32
    expected = jax.grad(lambda k: plain(hidden, k, *rest))(kernel)
    np.testing.assert_allclose(d_kernel, expected, atol=0.05)


@pytest.mark.parametrize("chunk", [5, 1000])
def test_log_probabilities_do_not_depend_on_the_chunk(case, chunk):
    hidden, kernel, targets, weights = case
    banned = [3, 7]
    targets = jnp.where(jnp.isin(targets, jnp.array(banned)), 0, targets)

    def expected(hidden, kernel):
        scores = jax.nn.log_softmax((hidden @ kernel).at[..., jnp.array(banned)].set(-jnp.inf))
        return jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]

    def both(function):
        loss = lambda h, k: (jnp.sum(weights * jnp.square(logp := function(h, k))), logp)  # noqa: E731
        gradients, logp = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
        return *gradients, logp

    got = both(lambda h, k: log_probs(h, k, targets, chunk, banned))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got, both(expected))


@pytest.mark.parametrize("chunk", [5, 1000])
def test_only_those_that_are_wanted_are_computed(case, chunk):
    hidden, kernel, targets, weights = case
    wanted = jnp.arange(T) % 3 == jnp.arange(B)[:, None] % 3

    def both(function):
        loss = lambda h, k: (jnp.sum(weights * jnp.square(logp := function(h, k))), logp)  # noqa: E731
        gradients, logp = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, kernel)
        return *gradients, logp

    got = both(lambda h, k: log_probs_where(h, k, targets, wanted, chunk, [3]))
    expected = both(lambda h, k: jnp.where(wanted, log_probs(h, k, targets, chunk, [3]), 0.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_chunks_of_which_none_is_wanted_have_no_logits(case):
    hidden, kernel, targets, _ = case
    wanted = jnp.zeros((B, T), bool).at[:, 3:7].set(True)
    damaged = jnp.where(wanted[..., None], hidden, jnp.nan)
    total = lambda h, k: log_probs_where(h, k, targets, wanted, 4).sum()  # noqa: E731
    for slope in jax.grad(total, (0, 1))(damaged, kernel):
        assert jnp.isfinite(slope).all()


def test_log_probabilities_never_need_all_logits_at_once(case):
    hidden, kernel, targets, _ = case
    text = str(jax.make_jaxpr(jax.grad(lambda h, k: log_probs(h, k, targets, 4).sum(), (0, 1)))(hidden, kernel))
    assert f"f32[1,{B * 4},{V}]" in text
    assert f"{B},{T},{V}]" not in text and f",{B * 16},{V}]" not in text
