"""Texts of a model that are no data, though Python's JSON takes them as such."""

import json

import pytest

from vlmem_jax.agent.building import caption_of
from vlmem_jax.agent.parsing import parse_action, parse_json


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", r'"\ud800"', r'{"\udfff": 1}', "9" * 5000])
def test_values_that_cannot_be_written(value):
    text = f'{{"description": {value}}}'
    assert parse_json(text) is None and caption_of(text) == text


@pytest.mark.parametrize("depth", [10, 900, 980, 990, 1000, 5000, 100_000])
def test_nested_text_of_any_depth(depth):
    """A build goes on, whether it is data or not."""
    text = "[" * depth + "]" * depth
    assert caption_of(text) == text


def test_a_block_that_is_no_data_gives_way_to_what_stands_around_it():
    assert parse_json('```json{"a": NaN```{"a": 1}') is None, "from the first brace on"
    assert parse_json('```json NaN```{"a": 1}') == {"a": 1}
    assert parse_json(json.dumps({"smile": "\U0001f600"})) == {"smile": "\U0001f600"}, "two halves are a character"


@pytest.mark.parametrize("text, action", [("", "MERGE"), ("discard", "DISCARD"), ("MERGE, not ADD_NEW", "ADD_NEW")])
def test_actions(text, action):
    assert parse_action(text) == action
