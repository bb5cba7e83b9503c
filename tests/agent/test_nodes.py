"""Nodes of a memory, written down and read again."""

import json

import pytest

from vlmem_jax.agent.nodes import Cue, Episode, Extracted, Frame, Grounding, Segment, from_json, to_json

SEGMENT = Segment(3, 0.1, 9.99, 'a "caption" \ud800 \u2028', (Frame("ab", 0.2), Frame("cd", 1 / 3)))
NODES = [
    SEGMENT,
    Episode(0, 0.0, 30.0, (0, 2), "", (Frame("ab", 0.2),)),
    Extracted(0, 0.0, 30.0, {"scenes": [{"location": "kitchen"}], "other": None}),
    Grounding(1, "entity", "mug", ("mug, a red one",), (0, 4)),
    Cue(0, 1.0, 2.0, "<b>said</b>"),
]


@pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)
def test_what_is_written_is_read(node):
    text = to_json(node)
    assert from_json(type(node), text) == node and text.isascii() and "\n" not in text


def test_keys_that_are_wrong_are_named():
    fields = json.loads(to_json(SEGMENT))
    with pytest.raises(ValueError, match="kind segment has the keys number, .*; got colour, weight, too"):
        from_json(Segment, json.dumps(fields | {"weight": 1, "colour": 2}))
    del fields["end"], fields["caption"]
    with pytest.raises(ValueError, match="there is no end, caption"):
        from_json(Segment, json.dumps(fields))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("number", True, "wrong number: it must be of int, got True"),
        ("number", 1.0, "wrong number"),
        ("start", "0", "wrong start: it must be a number, got '0'"),
        ("end", float("nan"), "wrong end: it must be a number, got nan"),
        ("caption", None, "wrong caption: it must be of str"),
        ("frames", ["ab"], "wrong frames: a frame is a name and a time, got 'ab'"),
        ("frames", [["ab", "1"]], "wrong frames"),
        ("frames", {"ab": 1}, "wrong frames: it must be of list"),
    ],
)
def test_values_that_are_wrong_are_named(key, value, told):
    with pytest.raises(ValueError, match=told):
        from_json(Segment, json.dumps(json.loads(to_json(SEGMENT)) | {key: value}))


@pytest.mark.parametrize("text", ["", "[1]", "{", "3", "[" * 10**5])
def test_what_is_no_node(text):
    with pytest.raises(ValueError, match="a node must be"):
        from_json(Segment, text)


def test_times_are_finite():
    with pytest.raises(ValueError):
        to_json(Segment(0, 0.0, float("inf")))
