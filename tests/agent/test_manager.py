"""The manager decides which segments make up an episode, and is shown frames of both."""

import dataclasses

import numpy as np
import pytest

from vlmem_jax.agent.manager import ManageConfig, Manager, view
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.policy import divergence, policy


def segment(number, frames=5, seconds=10.0):
    start = number * seconds
    shown = tuple(Frame(f"{number}/{n}", start + n) for n in range(frames))
    return Segment(number, start, start + seconds, f"caption {number}", shown)


def played(actions):
    """Episodes of the segments 0, 1, ... where the first has no action."""
    state, closed = Manager(), []
    for number, action in enumerate(["ADD_NEW", *actions]):
        state, episode = state.step(segment(number), action)
        closed += [episode] if episode else []
    return [one.segments for one in (*closed, state.episode)]


def test_actions():
    assert played(["MERGE", "ADD_NEW", "DISCARD", "MERGE"]) == [(0, 1), (2, 4)]
    assert played(["DISCARD", "DISCARD"]) == [(0,)]
    assert played(["ADD_NEW", "ADD_NEW"]) == [(0,), (1,), (2,)]


def test_a_segment_that_nobody_saw_changes_nothing():
    state, _ = Manager().step(segment(0))
    unseen = segment(1, frames=0)
    assert not state.asks(unseen) and state.step(unseen, "ADD_NEW") == (state, None)
    assert not Manager().asks(segment(0)) and Manager().episode is None


def test_an_episode_ends_with_its_last_segment():
    state, _ = Manager().step(segment(0))
    state, _ = state.step(dataclasses.replace(segment(1), end=12.5), "MERGE")
    assert (state.episode.start, state.episode.end) == (0.0, 12.5)


def test_equal_states_have_equal_keys():
    """However they were reached."""
    one, other = Manager(), Manager()
    for number, (a, b) in enumerate([("ADD_NEW", "ADD_NEW"), ("MERGE", "DISCARD"), ("ADD_NEW", "ADD_NEW")]):
        one, _ = one.step(segment(number), a)
        other, _ = other.step(segment(number), b)
    assert one.key(segment(3)) == other.key(segment(3)) == (2, 3)
    assert one.key(segment(3)) != one.step(segment(3), "MERGE")[0].key(segment(4))


def test_a_new_segment_is_seen_beside_a_long_episode():
    state = Manager((segment(0, 1000),))
    config = ManageConfig(images=64, reserved=16)
    shown = view(state, segment(1, 50), config)
    assert [len(frames) for frames in shown] == [48, 16]
    assert shown.episode[0].name == "0/0" and shown.episode[-1].name == "0/999"
    together = view(state, segment(1, 50), dataclasses.replace(config, reserved=0))
    assert len(together.episode) + len(together.segment) == 64 and len(together.segment) == 3
    short = view(Manager((segment(0, 10),)), segment(1, 100), config)
    assert [len(frames) for frames in short] == [10, 54]
    assert view(Manager((segment(0, 3),)), segment(1, 4), config) == (segment(0, 3).frames, segment(1, 4).frames)


def test_policies():
    np.testing.assert_allclose(policy([0.0, 0.0, np.log(2)]), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(policy([-1000.0, -1000.0 + 0.7 * np.log(3)], 0.7), [0.25, 0.75])
    assert divergence(policy([1.0, 2.0]), policy([1.0, 2.0])) == 0
    assert divergence(np.array([1.0, 0.0]), np.array([0.5, 0.5])) == pytest.approx(np.log(2))
    with pytest.raises(ValueError, match="must be finite"):
        policy([0.0, np.nan])
    with pytest.raises(ValueError, match="reserved must be below images=8, got 8"):
        ManageConfig(images=8, reserved=8)
