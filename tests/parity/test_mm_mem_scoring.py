"""Answers about long videos are read, and their frames chosen, as by MM-Mem's release."""

import json

import pytest

from vlmem_jax.agent import gates
from vlmem_jax.agent.segments import evenly
from vlmem_jax.agent.subtitles import release_transcript
from vlmem_jax.data.long_videos import (
    frames_of_seconds,
    frames_of_shots,
    in_order,
    named,
    option_letter,
    shot_of,
)
from vlmem_jax.evals.benchmarks import tallied
from vlmem_jax.scoring.videos import holds, letter, verdict


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "mm_mem/eval_scoring.json").read_text())


def test_letters(cases):
    for case in cases["mme_normalise"]:
        assert letter(case["in"]) == case["out"]


def test_answers_that_hold_the_true_one(cases):
    for case in cases["mlvu_compare"]:
        assert holds(case["answer"], case["ground_truth"], case["candidates"]) == case["correct"], case


def test_what_judges_say(cases):
    for case in cases["judge"]:
        assert verdict(case["judge_text"]) == (case["is_correct"], case["score"]), case


def test_videos_of_a_question(cases):
    for case in cases["hd_epic_inputs"]:
        videos = named(case["inputs"])
        assert list(dict.fromkeys(videos.values())) == case["ids"]
        assert list(dict.fromkeys(in_order(videos).values())) == case["ids_sorted"]
    for case in cases["hd_epic_idx"]:
        assert option_letter(case["idx"]) == case["letter"]


def test_frames_until_a_question(cases):
    for case in cases["vstream_ego"]:
        names = [f"{n + 1:06d}.jpg" for n in range(case["n_frames"])]
        first = case["start"] if case["use_start"] else 0
        assert frames_of_seconds(reversed(names), first, case["end"], case["fps"]) == case["frames"]
    for case in cases["vstream_movie"]:
        names = [
            f"shot_{shot:04d}_img_{image}.jpg"
            for shot in range(case["shots"])
            for image in range(case["images_per_shot"])
        ]
        first = shot_of(case["start"]) if case["use_start"] else None
        assert frames_of_shots(reversed(names), first, shot_of(case["end"])) == case["frames"]
    for case in cases["frame_subsample"]:
        assert evenly(case["n"], case["max"]).tolist() == case["idx"]


def test_shares_of_right_answers(cases):
    lines = [record | {"score": float(record["correct"])} for record in cases["accuracy"]["records"]]
    stats = cases["accuracy"]["stats"]
    [found] = tallied(lines).values()
    assert (found.right, found.total, found.accuracy) == (stats["correct"], stats["total"], stats["overall_accuracy"])
    groups = [key for key in stats if key.startswith("by_")]
    for key in groups:
        found = tallied(lines, key.removeprefix("by_"))
        assert found.keys() == stats[key].keys()
        for name, tally in found.items():
            wanted = stats[key][name]
            assert (tally.right, tally.total, tally.accuracy) == (
                wanted["correct"],
                wanted["total"],
                wanted["accuracy"],
            )
    assert groups


def test_a_token_that_was_drawn_counts_once(cases):
    for case in cases["baseline_label_aggregation_dedup"]:
        belief = gates.by_first_letter(gates.with_drawn(case["first"], case["top"]), list(case["probs"]))
        assert belief.probabilities == pytest.approx(case["probs"], abs=1e-12)


def test_subtitles(cases):
    assert release_transcript(cases["srt"]["text"]) == cases["srt"]["parsed"]
