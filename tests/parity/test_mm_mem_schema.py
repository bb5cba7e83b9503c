"""The graph of episodes, and what is found in it, are those of MM-Mem's release."""

import json

import numpy as np
import pytest

from vlmem_jax.agent.schema import ReleaseSchema, SchemaConfig, Texts


@pytest.fixture(scope="module")
def cases(golden):
    described = json.loads((golden / "mm_mem/graph.json").read_text())
    with np.load(golden / "mm_mem/graph_embeddings.npz", allow_pickle=False) as arrays:
        return [(case, arrays[f"g{case['id']}_embeddings"].astype(np.float64)) for case in described]


def built(case, vectors_ND):
    """The graph, and the embedder of the case."""
    table = dict(zip(case["texts"], vectors_ND, strict=True))

    def embed(texts):
        return np.stack([table[text] for text in texts])

    schema = ReleaseSchema(SchemaConfig(case["dedup_threshold"]))
    for episode in case["input"]:
        schema.add(episode["l2_index"], Texts.of(episode), embed)
    return schema, embed


def test_graphs(cases):
    for case, vectors_ND in cases:
        schema, _ = built(case, vectors_ND)
        nodes = [
            {"id": n, **{kind: list(of) for kind, of in texts._asdict().items()}} for n, texts in schema.texts.items()
        ]
        assert nodes == case["nodes"]
        assert sorted([*pair, key] for pair, key in schema.edges.items()) == sorted(case["edges"])
        assert {key: sorted(episodes) for key, episodes in schema.index.items()} == {
            key: sorted(episodes) for key, episodes in case["entity_graph"].items()
        }


def test_what_is_found(cases):
    for case, vectors_ND in cases:
        schema, embed = built(case, vectors_ND)
        scores = {(one["query"], one["text"]): one["score"] for one in case["rerank_scores"]}

        def rerank(query, texts, scores=scores):
            return [scores[query, text] for text in texts]

        for query in case["queries"]:
            sizes = query["similarity_threshold"], query["top_k_embedding"], query["top_k_rerank"]
            schema.config = SchemaConfig(case["dedup_threshold"], *sizes)
            if schema.index:
                chosen = schema.candidates(embed([query["query"]])[0], embed)
                assert chosen == query["candidate_set"]
            result = schema.search(query["query"], embed, rerank)
            if query["ordered_by_reranker"] or not query["candidate_set"]:
                assert result == query["result"]
            else:
                assert set(result) == set(query["result"])
