"""The reward of calls for memories."""

import numpy as np

from vlmem_jax.rl.plays.penalties import invocation_reward, negative_penalty, type_penalty


def test_without_invocation_there_is_no_penalty():
    score, other, nobody = np.array([1.0, 0, 0]), np.ones(3), np.zeros(3, bool)
    assert not type_penalty(score, other, nobody).any() and not negative_penalty(score, nobody).any()
    np.testing.assert_allclose(invocation_reward(score, np.array([0.5]), other, nobody), score - 0.5)


def test_penalties_are_those_of_each_prompt():
    score, other = np.array([[1.0, 0.0], [0.0, 0.0]]), np.array([[0.0, 0.5], [1.0, 0.0]])
    invoked = np.ones((2, 2), bool)
    reward = invocation_reward(score, np.array([[0.0], [1.0]]), other, invoked, alpha=0.5)
    np.testing.assert_allclose(reward, [[1, -0.5 * (0.5 + 0.5)], [-1 - 0.5, -1]])


def test_each_trajectory_may_have_a_base_of_its_own():
    score, base = np.array([[1.0, 0.5, 0.0]]), np.array([[0.5, 0.25, 0.25]])
    turned, invoked = np.array([[1.0, 1.0, 0.0]]), np.array([[True, True, False]])
    np.testing.assert_allclose(invocation_reward(score, base, turned, invoked, 0.4), [[0.5, 0.05, -0.25]])
    np.testing.assert_allclose(invocation_reward(score, base[:, :1], turned, invoked, 0.4), [[0.5, -0.2, -0.5]])
