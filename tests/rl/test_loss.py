import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.rl.loss import exact_kl, grpo_loss, has_collapsed, k3

ADVANTAGE = jnp.array([1.0, -1.0])


def gradient(ratio, **options):
    """Of the loss by the log-probabilities of a token of advantage 1 and one of -1, of this ratio to the sampler's."""
    logp = jnp.log(jnp.full(2, ratio))

    def loss(logp):
        return grpo_loss(logp, jnp.zeros(2), jnp.zeros(2), ADVANTAGE, jnp.ones(2), jnp.zeros(2), **options)[0]

    return jax.grad(loss)(logp).tolist()


def test_the_clip_stops_what_has_gone_far_enough():
    np.testing.assert_allclose(gradient(1.0), [-1, 1])
    np.testing.assert_allclose(gradient(1.1), [-1.1, 1.1], rtol=1e-6)
    np.testing.assert_allclose(gradient(1.25), [0, 1.25], rtol=1e-6)
    np.testing.assert_allclose(gradient(0.75), [-0.75, 0], rtol=1e-6)


def test_the_upper_bound_may_be_higher():
    np.testing.assert_allclose(gradient(1.25, clip=0.2, clip_high=0.28), [-1.25, 1.25], rtol=1e-6)
    np.testing.assert_allclose(gradient(1.3, clip=0.2, clip_high=0.28), [0, 1.3], rtol=1e-6)
    np.testing.assert_allclose(gradient(0.75, clip=0.2, clip_high=0.28), [-0.75, 0], rtol=1e-6)


def test_clipped_tokens_are_those_without_gradient():
    logp = jnp.log(jnp.array([1.25, 1.25, 0.75, 0.75, 1.0]))
    advantage = jnp.array([1.0, -1, 1, -1, 1])
    _, sums = grpo_loss(logp, 0 * logp, 0 * logp, advantage, jnp.ones(5), jnp.zeros(5))
    assert sums["clipped"] == 2


def test_kl_is_zero_where_both_agree_and_positive_elsewhere():
    logp, ref = jnp.array([-1.0, -1.0, -1.0]), jnp.array([-1.0, -2.0, -0.5])
    assert k3(logp, ref)[0] == 0 and (k3(logp, ref)[1:] > 0).all()


def test_of_all_labels_kl_is_what_the_estimate_by_drawn_ones_comes_to():
    logp_K, ref_K = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.3, -1.0, 2.0], [1.0, 0.5, -0.5]))
    exact = exact_kl(logp_K, ref_K)
    assert exact == pytest.approx(float((jnp.exp(logp_K) * k3(logp_K, ref_K)).sum()), rel=1e-5)
    assert exact_kl(logp_K, logp_K) == 0
    arguments = logp_K, logp_K, ref_K, jnp.zeros(3), jnp.ones(3), jnp.full(3, 0.5)
    loss, sums = grpo_loss(*arguments, kl=jnp.full(3, exact))
    assert loss == pytest.approx(1.5 * float(exact)) and sums["kl"] == pytest.approx(3 * float(exact))


def test_tokens_of_no_weight_may_hold_anything():
    nothing = jnp.array([-1e4, 0.0, jnp.nan])

    def loss(logp):
        weight, one = jnp.array([1.0, 0, 0]), jnp.ones(3)
        logp = jnp.concatenate([logp[:1], nothing[1:]])
        return grpo_loss(logp, nothing.at[0].set(0.0), nothing.at[0].set(0.0), one, weight, one)[0]

    value, slope = jax.value_and_grad(loss)(jnp.zeros(3))
    assert value == -1 and slope.tolist() == [-1, 0, 0]


def test_an_update_makes_what_scored_better_more_likely():
    """A policy of one token: probabilities move to the scores, until the clip."""
    tokens, advantage = jnp.array([0, 1, 2, 3]), jnp.array([1.5, -0.5, -0.5, -0.5])
    old = jax.nn.log_softmax(jnp.zeros(4))

    def loss(scores):
        logp = jax.nn.log_softmax(scores)[tokens]
        return grpo_loss(logp, old[tokens], old[tokens], advantage, jnp.ones(4), jnp.zeros(4))[0]

    slope = jax.jit(jax.grad(loss))
    scores = -0.1 * slope(jnp.zeros(4))
    new = jax.nn.softmax(scores)
    assert (new * advantage).sum() > (jnp.exp(old) * advantage).sum() + 0.01
    for _ in range(200):
        scores -= 0.1 * slope(scores)
    rest = jax.nn.softmax(scores)[1:] / 0.25
    assert ((rest > 0.78) & (rest < 0.8)).all(), "the clip stops it once all ratios are out of bounds"


def test_what_has_gone_very_far_is_bounded():
    logp = jnp.array([-200.0, -1.0, 0.0])
    assert jnp.isfinite(k3(logp, jnp.zeros(3))).all() and k3(logp, logp).tolist() == [0, 0, 0]
    for a, b in ((logp, jnp.zeros(3)), (jnp.zeros(3), logp)):
        loss, sums = grpo_loss(a, b, b, -jnp.ones(3), jnp.ones(3), jnp.ones(3))
        assert jnp.isfinite(loss) and all(jnp.isfinite(value) for value in sums.values())
    assert k3(jnp.float32(-19.0), jnp.float32(0)) == jnp.exp(jnp.float32(19)) - 20


def test_a_segment_with_one_token_that_collapsed_is_skipped_as_a_whole():
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 2, 2, 2, 3]])
    old = jnp.full((2, 5), -1.0)
    weights = jnp.array([[1.0, 1, 0, 1, 0], [1, 0.5, 0.5, 0.5, 1]])
    logp = old.at[0, 0].set(-22.0).at[0, 2].set(-90.0).at[0, 4].set(jnp.nan).at[1, 3].set(jnp.nan).at[1, 4].set(-20.0)
    found = has_collapsed(logp, old, segments, weights)
    assert found.tolist() == [[True, True, False, False, False], [False, True, True, True, False]]
