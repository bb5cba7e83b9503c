import numpy as np

from vlmem_jax.rl.advantages import group_advantages, varied

SCORES = np.array([[1.0, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [3, 1, 1, 1]])


def test_advantages_are_normalised_in_their_group():
    np.testing.assert_allclose(
        group_advantages(SCORES[[0, 2]], eps=0.0), [[1, -1, -1, 1], np.array([3, -1, -1, -1]) / 3**0.5]
    )
    np.testing.assert_allclose(group_advantages(SCORES, std=False)[2], [1.5, -0.5, -0.5, -0.5])


def test_groups_that_tie_have_no_advantage_whatever_rounding_does():
    ties = np.full((1, 3), 0.1)
    assert ties.mean() != 0.1
    for std in (True, False):
        np.testing.assert_array_equal(group_advantages(ties, std, eps=0.0), 0)
    np.testing.assert_array_equal(group_advantages(SCORES, eps=1e-4)[1], 0)


def test_groups_that_all_score_the_same_are_found():
    assert varied(SCORES).tolist() == [True, False, True]


def test_the_deviation_may_be_that_of_the_sample_and_has_a_floor():
    np.testing.assert_allclose(group_advantages(SCORES, eps=0.0, ddof=1)[0], np.array([1, -1, -1, 1]) * 0.75**0.5)
    np.testing.assert_allclose(group_advantages(SCORES, eps=0.0, min_std=2.0)[0], [0.25, -0.25, -0.25, 0.25])
    np.testing.assert_allclose(group_advantages(SCORES, eps=0.0, min_std=0.1), group_advantages(SCORES, eps=0.0))
