"""Decisions of the memory's manager, and what comes of them, are those of MM-Mem's release."""

import json

import numpy as np
import pytest

from vlmem_jax.agent.manager import ManageConfig, Manager, view
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.parsing import parse_action, parse_json
from vlmem_jax.agent.policy import divergence, policy
from vlmem_jax.agent.segments import Span, frames_at_rate

RELEASE = ManageConfig(reserved=0)


@pytest.fixture(scope="module")
def read(golden):
    return lambda name: json.loads((golden / "mm_mem" / name).read_text())


def test_texts_of_the_model(read):
    described = read("parsing.json")
    for case in described["json"]:
        assert parse_json(case["text"]) == case["parsed"]
    for case in described["decisions"]:
        assert parse_action(case["text"]) == case["decision"]


def test_one_token_of_a_label(read):
    """What the release learns from: the log-probability of one token, whatever action it stands for."""
    described = read("policy_logprob.json")
    for case in described["cases"]:
        assert described["vocab"][case["sampled_token"]] == case["decoded"]
        assert parse_action(case["decoded"]) == case["decision"]
        logp = np.log(policy(case["logits"]))[case["sampled_token"]]
        np.testing.assert_allclose([logp, logp], [case["log_prob"], case["recomputed_log_prob"]], atol=1e-6)


def test_policies_over_whole_labels(read):
    for case in read("formula.json")["action_policy"]:
        scores, reference = ([sum(of) for of in case[key]] for key in ("token_log_probs", "ref_token_log_probs"))
        p, other = policy(scores), policy(reference)
        np.testing.assert_allclose(p, case["pi"], rtol=1e-12)
        np.testing.assert_allclose(other, case["pi_ref"], rtol=1e-12)
        for key in case:
            if key.startswith("pi_T"):
                np.testing.assert_allclose(policy(scores, float(key.removeprefix("pi_T"))), case[key], rtol=1e-12)
        np.testing.assert_allclose([divergence(p, other), -p @ np.log(p)], [case["kl"], case["entropy"]], rtol=1e-9)


def segments(case):
    """With names of frames as the release makes them."""
    for node in case["l1_nodes"]:
        names = [f"l1_{node['l1_index']:04d}/{name}" for name in node["frame_paths"]]
        frames = tuple(Frame(name, float(name.rsplit("_", 1)[1].removesuffix(".jpg"))) for name in names)
        yield Segment(node["l1_index"], node["start_sec"], node["end_sec"], node["caption"], frames)


def test_episodes_of_scripted_decisions(read):
    for case in read("rollout.json")["cases"]:
        state, closed, steps = Manager(), [], []
        actions, queries = iter(case["scripted_decisions"]), iter(case["decision_queries"])
        for segment in segments(case):
            action, shown = "ADD_NEW", []
            if state.asks(segment):
                action, query = parse_action(next(actions)), next(queries)
                shown = [frame.name for frames in view(state, segment, RELEASE) for frame in frames]
                episode = state.episode
                assert (episode.start, episode.end) == (query["l2_start"], query["l2_end"])
                assert (segment.start, segment.end) == (query["l1_start"], query["l1_end"])
                assert (segment.caption, len(shown)) == (query["l1_caption"], query["n_images"])
            if segment.frames:
                steps.append((segment.number, action, shown))
            state, episode = state.step(segment, action)
            closed += [episode] if episode else []
        closed += [state.episode] if state.members else []
        assert steps == [(step["l1_index"], step["decision"], step["combined"]) for step in case["steps"]]
        assert len(closed) == len(case["l2_nodes"])
        for episode, node in zip(closed, case["l2_nodes"], strict=True):
            assert (episode.number, episode.start, episode.end) == (
                node["l2_index"],
                node["start_sec"],
                node["end_sec"],
            )
            assert list(episode.segments) == node["constituent_l1_indices"]
            span = Span(episode.start, episode.end)
            frames = frames_at_rate(span, case["video_fps"], case["total_frames"], 2.0)
            assert [f"frame_{n / case['video_fps']:.3f}.jpg" for n in frames] == node["frame_paths"]
