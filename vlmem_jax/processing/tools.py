"""What turns say of tools, as Qwen's models learned it: JSON between tags, in the texts of a dialogue.

Tools are told in the system turn, called for in an answer, and answer in the turn of the user.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlmem_jax.processing.chat import Message

_TOLD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def told(tools: Sequence[Mapping[str, Any]], system: str | None = None) -> str:
    """The text of a system turn that tells of `tools`, each an object with `type` and `function` as OpenAI has them."""
    listed = _TOLD.format(tools="\n".join(map(_json, tools)))
    return f"{system}\n\n{listed}" if system else listed


def called(calls: Sequence[Mapping[str, Any]], text: str = "") -> str:
    """An answer of `text` and then `calls`, each of a `name` and `arguments`, an object or its JSON."""
    written = []
    for call in calls:
        name, arguments = json.dumps(call["name"], ensure_ascii=False), _json(call["arguments"])
        written.append(f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>')
    return "\n".join([text, *written] if text else written)


def answered(answers: Sequence[Message]) -> Message:
    """The parts of the one turn in which tools answer; an answer may show images."""
    pieces = [("<tool_response>\n", *answer, "\n</tool_response>") for answer in answers]
    return tuple(part for n, one in enumerate(pieces) for part in (("\n", *one) if n else one))


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
