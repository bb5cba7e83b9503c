"""Rewards say what decisions are worth."""

import pytest

from vlmem_jax.agent.nodes import Segment
from vlmem_jax.agent.rewards import (
    Judged,
    Reward,
    Step,
    Weights,
    approval,
    excess_characters,
    excess_tokens,
    judged,
    right,
)
from vlmem_jax.agent.segments import Span


def test_a_reward_grows_with_what_is_good_alone():
    worst = Reward(0.0, 0.0, 1.0, 1.0)
    assert worst.total() == pytest.approx(-0.1 - 0.3)
    for better in (worst._replace(answer=1.0), worst._replace(excess=0.0), worst._replace(divergence=0.5)):
        assert better.total() > worst.total()
    assert Reward(0.5, 0.8).total(Weights(answer=2.0)) == pytest.approx(1.4)


def test_options_by_number():
    assert (right("c", 2), right("B", 2), right("", 0)) == (1.0, 0.0, 0.0)


def test_long_captions_cost_less_than_a_wrong_answer():
    assert excess_tokens([128, 64]) == 0 and excess_tokens([]) == 0
    assert excess_tokens([192, 128]) == 0.25
    assert excess_tokens([10**6]) * Weights().excess < Weights().answer
    assert excess_characters([10**6], 200) * Weights().excess > 10**4, "in the release they do not"


def test_a_supervisor_is_told_of_the_episode_as_it_was():
    segments = [Segment(n, n * 10.0, n * 10.0 + 10, f"caption {n}") for n in range(5)]
    steps = [
        Step(0, "ADD_NEW", asked=False), Step(1, "MERGE"), Step(2, "DISCARD"), Step(3, "ADD_NEW"), Step(4, "MERGE")
    ]  # fmt: skip
    assert judged(segments, steps) == [
        Judged(Span(0, 10), "caption 0", Span(10, 20), "caption 1", "MERGE"),
        Judged(Span(0, 20), "caption 0", Span(20, 30), "caption 2", "DISCARD"),
        Judged(Span(0, 20), "caption 0", Span(30, 40), "caption 3", "ADD_NEW"),
        Judged(Span(30, 40), "caption 3", Span(40, 50), "caption 4", "MERGE"),
    ]


def test_videos_share_no_judgement():
    """Though their segments have the same times."""
    one = Judged(Span(0, 10), "a", Span(10, 20), "b", "MERGE")
    keys = {one.key("v", "s", "1"), one.key("w", "s", "1"), one.key("v", "t", "1"), one.key("v", "s", "2")}
    others = {one._replace(episode_caption="c").key("v", "s", "1"), one._replace(action="DISCARD").key("v", "s", "1")}
    assert len(keys | others) == 6 and one.key("v", "s", "1") in keys


def test_saying_nothing_is_no_approval():
    assert approval([[("yes", 0.0)], [("perhaps", 0.0)], None]) == pytest.approx(1 / 3)
    assert approval([]) == 0
