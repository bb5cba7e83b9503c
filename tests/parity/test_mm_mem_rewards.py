"""Rewards of trajectories, and what a supervisor is told of them, are those of MM-Mem's release."""

import json

import pytest

from vlmem_jax.agent.nodes import Segment
from vlmem_jax.agent.rewards import Reward, Step, Weights, approval, excess_characters, judged, right


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "mm_mem/reward.json").read_text())


def lengths(case, key):
    return [length if isinstance(length, int) else None for length in case[key]]


def test_right_answers(cases):
    for case in cases["correct"]:
        assert right(case["predicted"], case["correct_idx"]) == case["reward"], case


def test_lengths_of_captions(cases):
    for case in cases["caption_length"]:
        found = -excess_characters(lengths(case, "caption_lengths"), case["threshold"])
        assert found == pytest.approx(case["reward"], abs=1e-9)


def test_whole_rewards(cases):
    for case in cases["composite"]:
        segments = [
            Segment(one["l1_index"], one["start_sec"], one["end_sec"], one["caption"]) for one in case["l1_nodes"]
        ]
        steps = [Step(one["l1_index"], one["decision"], not one["is_default"]) for one in case["steps"]]
        queries = case["supervisor_queries"]
        told = [
            (*one.episode, one.episode_caption, *one.segment, one.segment_caption, one.action)
            for one in judged(segments, steps)
        ]
        keys = ("l2_start", "l2_end", "l2_caption", "l1_start", "l1_end", "l1_caption", "decision")
        assert told == [tuple(query[key] for key in keys) for query in queries]
        weights = Weights(case["weights"]["correct"], case["weights"]["supervisor"], case["weights"]["length"])
        found = Reward(
            right(case["predicted"], case["correct_idx"]),
            approval([query["logprobs"] for query in queries]),
            excess_characters(lengths(case, "l2_caption_lengths"), case["weights"]["threshold"]),
        )
        for reward, wanted in (
            (found, case["reward"]),
            (found._replace(supervisor=0.0), case["reward_without_supervisor"]),
        ):
            assert reward.total(weights) == pytest.approx(wanted["total"], abs=1e-9)
            assert (reward.answer, -reward.excess) == pytest.approx((wanted["correct"], wanted["caption_length"]))
            assert reward.supervisor == pytest.approx(wanted["supervisor"], abs=1e-9)
