"""Tools in the texts of a dialogue."""

import json

from vlmem_jax.processing.tools import answered, called, told

LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


def test_each_tool_is_a_line_of_json_in_the_system_turn():
    text = told([LOOK_UP, {"type": "function", "function": {"name": "höher"}}], "Be brief.")
    assert text.startswith("Be brief.\n\n# Tools\n\n") and told([LOOK_UP]).startswith("# Tools\n\n")
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert json.loads(lines[0]) == LOOK_UP and "höher" in lines[1], "not escaped"


def test_calls_stand_behind_the_text_of_an_answer():
    call = '<tool_call>\n{"name": "look_up", "arguments": {"query": "cat"}}\n</tool_call>'
    for arguments in ({"query": "cat"}, '{"query": "cat"}'):
        assert called([{"name": "look_up", "arguments": arguments}]) == call
        assert called([{"name": "look_up", "arguments": arguments}] * 2, "So:") == f"So:\n{call}\n{call}"


def test_tools_answer_in_one_turn_and_may_show_images():
    image = object()
    first, second = answered([["12.0"], ["seen ", image]])[:3], answered([["12.0"], ["seen ", image]])[3:]
    assert first == ("<tool_response>\n", "12.0", "\n</tool_response>")
    assert second == ("\n", "<tool_response>\n", "seen ", image, "\n</tool_response>")
