"""What a model wrote, as data. Nothing here raises: text that is not what was asked for is None, or what the release of
MM-Mem makes of it."""

import json
import re
from typing import Any

from vlmem_jax.agent.manager import ACTIONS, Action


def parse_json(text: str) -> Any | None:
    """The JSON in a text: of the first block that is fenced as such, or from the first brace to the last, or all of it.
    None if neither is JSON that can be written anew, or it is null."""
    fenced = re.search(r"```json(.*?)```", text, re.S)
    braces = text[text.find("{") : text.rfind("}") + 1] if "{" in text else ""
    for candidate in (fenced[1] if fenced else "", braces, text):
        try:
            found = json.loads(candidate)
            # Python reads NaN, 1e999 and halves of surrogates, which no node and no tokenizer takes.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            return found
        except (ValueError, RecursionError):
            continue
    return None


def parse_action(text: str) -> Action:
    """The action that a text names, by the first of `ACTIONS` that is in it; MERGE if none is."""
    return next((action for action in ACTIONS if action in text.upper()), "MERGE")
