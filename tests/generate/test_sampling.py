import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.generate.sampling import GREEDY, LIMITED, SAMPLED, Choice, SamplingConfig, choose, filter_logits, need
from vlmem_jax.runtime.shapes import bucket


def kept(probabilities, top_k, top_p):
    logits = filter_logits(jnp.log(jnp.array([probabilities])), top_k, top_p)
    return np.flatnonzero(np.isfinite(logits[0])).tolist()


def test_top_k_and_top_p_keep_the_most_probable():
    p = [0.1, 0.5, 0.05, 0.3, 0.05]
    assert kept(p, 2, 1.0) == [1, 3]
    assert kept(p, 5, 0.5) == [1]
    assert kept(p, 5, 0.51) == [1, 3]
    assert kept(p, 5, 0.85) == [0, 1, 3]
    assert kept(p, 2, 0.7) == [1, 3]  # of the two kept by top_k the first has 0.5 / 0.8 < 0.7
    assert kept(p, 2, 0.6) == [1]


def test_draws_follow_the_distribution():
    p = np.array([0.2, 0.0, 0.5, 0.3])
    rows = 4000
    logits = jnp.log(jnp.tile(jnp.asarray(p), (rows, 1)))
    choice = jax.tree.map(jnp.asarray, Choice.make(SamplingConfig(temperature=1.0), rows, 4, [2], []))
    drawn, logp = choose(logits.astype(jnp.float32), choice, jnp.zeros(rows, jnp.int32), SAMPLED)
    shares = np.bincount(drawn, minlength=4) / rows
    np.testing.assert_allclose(shares, [0.4, 0, 0, 0.6], atol=0.03)
    np.testing.assert_allclose(np.exp(logp), np.array([0.4, 0, 0, 0.6])[drawn], rtol=1e-5)


def test_rows_of_a_batch_have_settings_of_their_own():
    """And draw what they draw alone, whatever their neighbours need."""
    settings = [
        SamplingConfig(),
        SamplingConfig(temperature=0.7, seed=3),
        SamplingConfig(temperature=2.0, top_k=2, seed=4),
        SamplingConfig(temperature=1.0, top_p=0.5, seed=5),
    ]
    assert [need(one) for one in settings] == [GREEDY, SAMPLED, LIMITED, LIMITED]
    logits_BV = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32))
    each = [jax.tree.map(jnp.asarray, Choice.make(one, 1, 50, [row], [])) for row, one in enumerate(settings)]
    together, chosen = jax.tree.map(lambda *x: jnp.concatenate(x), *each), jax.jit(choose)
    for index in range(20):
        drawn_B, logp_B = chosen(logits_BV, together, jnp.full(4, index), LIMITED)
        for row, (one, choice) in enumerate(zip(settings, each, strict=True)):
            [alone], [logp] = chosen(logits_BV[row : row + 1], choice, jnp.full(1, index), need(one))
            assert (alone, logp) == (drawn_B[row], logp_B[row]) and alone != row
        assert drawn_B[2] in jnp.argsort(logits_BV[2].at[2].set(-jnp.inf))[-2:]


@pytest.mark.parametrize(
    "key, value", [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_bad_settings_name_their_key(key, value):
    with pytest.raises(ValueError, match=f"{key} must be"):
        SamplingConfig(**{key: value})


def test_buckets_hold_their_size_and_waste_at_most_a_third():
    assert bucket(0) == 0
    for smallest in (1, 16, 64):
        for size in range(smallest, 3000):
            assert size <= bucket(size, smallest) < max(size * 1.5 + 1, smallest + 1)
    assert len({bucket(size, 64) for size in range(1, 20_000)}) < 20


def test_seeds_wrap_round():
    key_B2 = Choice.make(SamplingConfig(seed=2**40 + 5), 2, 4, [], []).key_B2
    for row, seed in enumerate((5, 6)):
        np.testing.assert_array_equal(key_B2[row], jax.random.key_data(jax.random.key(seed)))
