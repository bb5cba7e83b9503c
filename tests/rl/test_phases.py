"""What a phase gives to learn from, by the rewards of its episodes and what they are made of."""

import numpy as np
import pytest

from tests.rl.test_resume import PROMPT, step
from vlmem_jax.rl import RLConfig
from vlmem_jax.rl.episodes import Episode, Played
from vlmem_jax.rl.phases import Phases
from vlmem_jax.rl.stream import Loaded

PROMPTS = [Loaded((0, n), None, PROMPT) for n in range(2)]


def played(rewards, scores):
    return Played(
        [
            [
                Episode((step(g, 3),), reward, {"score": score})
                for g, (reward, score) in enumerate(zip(*row, strict=True))
            ]
            for row in zip(rewards, scores, strict=True)
        ],
        numbers={"mine": 3.0},
    )


REWARDS, SCORES = [[1.0, 0.9, 1.1], [1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 0.0, 0.5]]


def learned(**keys):
    phases = Phases(RLConfig(prompts=2, group_size=3, advantage_std=False, **keys))
    phases.begin()
    phases.learn_from(0, PROMPTS, played(REWARDS, SCORES), 1.0, 0)
    return phases


def test_a_group_may_tie_by_a_part_of_its_rewards():
    by_reward, by_score, kept = learned(), learned(ties_by="score"), learned(ties_by="score", drop_zero_variance=False)
    assert [lesson.key for lesson in by_reward.lessons] == [(0, 0)] * 3 + [(0, 1)] * 3
    assert [lesson.key for lesson in by_score.lessons] == [(0, 1)] * 3
    assert [phases.numbers["rollout/zero_variance_groups"] for phases in (by_reward, by_score)] == [0, 1]
    assert [lesson.advantage for lesson in kept.lessons[:3]] == [0, 0, 0], "whatever else differs"
    np.testing.assert_allclose([lesson.advantage for lesson in kept.lessons[3:]], [2 / 3, -1 / 3, -1 / 3])


def test_parts_and_what_the_play_counts_are_recorded():
    numbers = learned().numbers
    assert numbers["score/mean"] == pytest.approx(0.75) and numbers["mine"] == 3
    assert numbers["score/std"] == pytest.approx(np.std(SCORES[1]) / 2)


def test_a_part_that_rewards_have_not_is_named():
    with pytest.raises(ValueError, match="task.ties_by must name a part of the reward, one of score; got 'vqa'"):
        learned(ties_by="vqa")


def test_minibatches_share_the_lessons_out():
    phases = learned(minibatches=4)
    parts = [phases.part(n) for n in range(4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1] and sum(parts, []) == phases.lessons
