"""A memory built and asked from scripted replies, call by call as in MM-Mem's release."""

import dataclasses
import json

import numpy as np
import pytest

from vlmem_jax.agent import prompts
from vlmem_jax.agent.building import BuildConfig, build
from vlmem_jax.agent.calls import Reply, run
from vlmem_jax.agent.manager import ManageConfig
from vlmem_jax.agent.nodes import Frame, Segment
from vlmem_jax.agent.release import Graph
from vlmem_jax.agent.retrieve import RELEASE, Memory, answer
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import Span, frames_at_rate, split

KINDS = {
    "L1CAP": "caption",
    "DEC": "decide",
    "L2CAP": "narrate",
    "L3ENT": "extract",
    "VQA": "answer",
    "REL": "relevant",
}


class Scripted:
    """Answers by the log of a run, and checks that it is asked for the same."""

    def __init__(self, log):
        self.log = list(log)

    def answer(self, calls):
        return [self._reply(call, self._next(call)) for call in calls]

    def _next(self, call):
        """The next entry; extractions of several episodes are asked for side by side, then again where that failed."""
        last = call.frames[-1].time if call.frames else 0
        for n, entry in enumerate(self.log):
            if call.kind != "extract" or entry["images"][-1].endswith(f"frame_{last:.3f}.jpg"):
                return self.log.pop(n)
        raise AssertionError(f"nobody asked {call}")

    def _reply(self, call, entry):
        assert call.kind == KINDS[entry["kind"]]
        wanted = [name.rsplit("/", 1)[-1] for name in entry["images"]]
        assert len(call.frames) == len(wanted)
        if wanted[:1] != ["<array>"]:
            assert [f"frame_{frame.time:.3f}.jpg" for frame in call.frames] == wanted
        if entry.get("labels"):
            assert "/".join(call.labels) == entry["labels"]
            assert f"{prompts.plain(entry['options_text'])}\n" in call.text
            quotes = [
                line.removeprefix(prompts.QUOTE) for line in call.text.splitlines() if line.startswith(prompts.QUOTE)
            ]
            assert quotes == [prompts.plain(line) for line in entry["context"].splitlines()]
        if fields := entry.get("fields"):
            for key in ("episode", "l1"):
                assert prompts.seconds(fields[f"{key}_start"], fields[f"{key}_end"]) in call.text
            assert prompts.quoted([fields["l1_caption"]]) in call.text
        if call.kind in ("answer", "relevant"):
            return Reply(tokens=entry["logprobs"])
        return Reply(text=entry["response"])


@pytest.fixture(scope="module")
def cases(golden):
    described = json.loads((golden / "mm_mem/e2e.json").read_text())
    with np.load(golden / "mm_mem/e2e_embeddings.npz", allow_pickle=False) as arrays:
        return [(case, arrays[f"c{case['id']}_embeddings"].astype(np.float64)) for case in described]


def world(case, vectors_ND):
    """What a case has outside the model: frames of the video, vectors, and the re-ranker."""
    table = dict(zip(case["texts"], vectors_ND, strict=True))
    scores = {(one["query"], one["text"]): one["score"] for one in case["rerank_scores"]}

    def frames_of(span, fps):
        chosen = frames_at_rate(span, case["video_fps"], case["total_frames"], fps)
        return tuple(Frame(f"{n}", n / case["video_fps"]) for n in chosen.tolist())

    def embed(texts):
        return np.stack([table[text] for text in texts])

    return frames_of, embed, lambda query, texts: [scores[query, text] for text in texts]


def built(case, frames_of):
    config, length = case["config"], case["total_frames"] / case["video_fps"]
    scenes = [Span(*scene) for scene in case["scenes"]] or [Span(0.0, length)]
    spans = [span for scene in scenes for span in split(scene, config["l1_max_segment_duration"])]
    segments = [Segment(n, *span, frames=frames_of(span, config["l1_fps"])) for n, span in enumerate(spans)]
    manage = ManageConfig(config["l2_max_input_frames"], reserved=0)
    how = BuildConfig(manage, config["l2_fps"], config["l3_fps"], images=0, attempts=5)
    model = Scripted(case["build_calls"])
    pyramid = run(build(segments, how, frames_of), model)
    assert not model.log, "all calls were made"
    return pyramid, Span(0.0, length)


def test_memories(cases):
    for case, vectors_ND in cases:
        frames_of, embed, _ = world(case, vectors_ND)
        pyramid, span = built(case, frames_of)
        seen = [segment for segment in pyramid.segments if segment.frames]
        found = [(one.number, one.start, one.end, one.caption, [f.time for f in one.frames]) for one in seen]
        assert found == [
            (one["l1_index"], one["start_sec"], one["end_sec"], one["caption"], one["frame_timestamps"])
            for one in case["l1"]
        ]
        found = [
            (one.number, one.start, one.end, one.caption, list(one.segments), [f.time for f in one.frames])
            for one in pyramid.episodes
        ]
        assert found == [
            (one["l2_index"], one["start_sec"], one["end_sec"], one["caption"], one["constituent_l1_indices"],
             one["frame_timestamps"]) for one in case["l2"]
        ]  # fmt: skip
        for one in case["l3"]:
            said = pyramid.extracted[one["l2_index"]]
            assert [said.get(kind, []) for kind in ("entities", "actions", "scenes")] == [
                one[kind] for kind in ("entities", "actions", "scenes")
            ]
        memory = remembered(case, pyramid, frames_of, span, embed)
        graph, result = Graph.of_schema(memory.schema), case["build_result"]
        assert sorted([*pair, key] for pair, key in graph.edges.items()) == sorted(case["graph"]["edges"])
        assert graph.index == case["graph"]["entity_graph"]
        assert (len(seen), len(pyramid.episodes)) == (result["num_l1_nodes"], result["num_l2_nodes"])
        assert (len(graph.index), len(graph.edges)) == (result["num_l3_entities"], result["num_graph_edges"])


def remembered(case, pyramid, frames_of, span, embed):
    config = case["config"]
    schema = SchemaConfig(
        config["l3_entity_dedup_threshold"],
        config["l3_retrieval_similarity_threshold"],
        config["l3_coarse_top_k"],
        config["l3_rerank_top_k"],
    )
    memory = Memory.of(pyramid, frames_of, span, embed, schema, release=True)
    return memory._replace(schema_fps=config["l3_fps"])


def test_answers(cases):
    for case, vectors_ND in cases:
        frames_of, embed, rerank = world(case, vectors_ND)
        pyramid, span = built(case, frames_of)
        memory, config = remembered(case, pyramid, frames_of, span, embed), case["config"]
        how = dataclasses.replace(
            RELEASE,
            gamma=config["entropy_threshold"],
            initial=config["initial_vqa_confidence"],
            nearest=config["l2_embedding_top_k"],
            episodes=config["l2_visual_top_k"],
            segments=config["l1_top_k"],
        )
        for query in case["queries"]:
            model = Scripted(query["calls"])
            found = run(answer(memory, query["question"], query["options"], embed, rerank, how), model)
            wanted = query["result"]
            assert not model.log, "all calls were made"
            record = found.record()
            assert len(record["retrieval_trace"]) == len(wanted["retrieval_trace"])
            for one, other in zip(
                [record, *record["retrieval_trace"]], [wanted, *wanted["retrieval_trace"]], strict=True
            ):
                for key in other.keys() - {"retrieval_trace"}:
                    assert one[key] == (pytest.approx(other[key], abs=1e-12) if _is_number(other[key]) else other[key])
            assert found.calls == len(query["calls"])
            assert found.images == sum(len(call["images"]) for call in query["calls"])


def _is_number(value):
    return isinstance(value, (float, dict))
