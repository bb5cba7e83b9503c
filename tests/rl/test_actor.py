"""Scores that are waited for, beside whatever rewards may do."""

from concurrent.futures import Future

import pytest

from vlmem_jax.rl import actor
from vlmem_jax.rl.actor import Scores
from vlmem_jax.scoring.rewards import RewardError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(actor, "ASKED", 0.01)


def done(score):
    future = Future()
    future.set_result(score)
    return future


def failed(error):
    future = Future()
    future.set_exception(error)
    return future


def test_scores_stand_in_the_order_of_their_outputs():
    scores = Scores({2: done((2.0, False)), 0: done((0.0, True)), 1: done((1.0, False))})
    assert scores.of_all.tolist() == [0, 1, 2] and scores.failed == 1


def test_who_waits_for_a_reward_that_never_ends_can_be_stopped():
    asked = []

    def may_stop():
        asked.append(len(asked))
        if len(asked) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        _ = Scores({0: done((1.0, False)), 1: Future()}, may_stop).of_all
    assert len(asked) == 3


@pytest.mark.parametrize(
    "error, words",
    [
        (RewardError("reward mine must be finite"), "^reward mine must be finite"),
        (SystemExit("no licence"), "^a reward raised SystemExit: no licence"),
        (MemoryError(), "^a reward raised MemoryError"),
    ],
)
def test_whatever_a_reward_raises_is_told_while_others_are_at_work(error, words):
    with pytest.raises(RewardError, match=words) as caught:
        _ = Scores({0: Future(), 1: failed(error)}).of_all
    assert caught.value.__cause__ is error
