"""Concepts that episodes have in common."""

import numpy as np
import pytest

from vlmem_jax.agent.schema import Schema, SchemaConfig, Texts

DIRECTIONS = {"mug": 0, "cup": 0, "river": 1, "washes": 2, "kitchen": 3, "dog": 4}
"""The axis that each word points along; other words have an axis of their own, the last."""


def embed(texts):
    """Unit vectors of the words of each text."""
    vectors = np.zeros((len(texts), 6))
    for vector, text in zip(vectors, texts, strict=True):
        for word in text.lower().replace(",", "").split():
            vector[DIRECTIONS.get(word, 5)] += 1 if word in DIRECTIONS else 0.1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def schema():
    schema = Schema(SchemaConfig(first=3, kept=2))
    schema.add(0, Texts(("Mug, a red mug", "dog"), ("dog, washes",), ("kitchen",)), embed)
    schema.add(1, Texts(("cup, the same mug",), (), ("river bank",)), embed)
    schema.add(2, Texts((), ("dog, washes",), ("kitchen, at night",)), embed)
    return schema


def test_concepts_are_joined_within_their_kind(schema):
    found = [(one.kind, one.name, one.glosses, one.episodes) for one in schema.concepts]
    assert found == [
        ("entity", "mug", ["Mug, a red mug", "cup, the same mug"], [0, 1]),
        ("entity", "dog", [], [0]),
        ("action", "dog", ["dog, washes"], [0, 2]),
        ("scene", "kitchen", ["kitchen, at night"], [0, 2]),
        ("scene", "river bank", [], [1]),
    ]
    assert schema.edges() == {(0, 1): ["mug"], (0, 2): ["dog", "kitchen"]}


def test_episodes_are_found_by_their_best_concept(schema):
    found = schema.search(embed(["the river"])[0])
    assert [episode for episode, _ in found] == [1] and found[0][1] > 0.9
    assert [episode for episode, _ in schema.search(embed(["mug"])[0])] == [0, 1]


def test_what_is_like_nothing_is_ranked_all_the_same(schema):
    query = 0.4 * embed(["river"])[0] + 0.2 * embed(["washes"])[0]
    assert [episode for episode, _ in schema.search(query)] == [1, 0, 2]


def test_what_was_not_extracted_as_asked_is_left_out():
    entities = ["mug", {"entity name": " cup ", "description": None}, {"description": "x"}]
    extracted = {"entities": entities, "actions": "y", "scenes": [{"location": 3}, {"location": "here"}]}
    assert Texts.of(extracted) == Texts(("cup",), (), ("here",))
    assert Schema().add(0, Texts((", nameless",)), embed) == []
    with pytest.raises(ValueError, match="kept must be between 1 and first=3, got 4"):
        SchemaConfig(first=3, kept=4)
