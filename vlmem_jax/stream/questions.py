"""Questions about a stream: of the command line, of a file, and of lines as they are typed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

END = float("inf")
"""Stands for the time of a question that waits for the end of its stream."""


class Question(NamedTuple):
    """A question, and when it is asked."""

    text: str
    at: float | None = None
    """Seconds of the stream, all frames up to which are seen by then; END, or None: now."""


def of_flags(asked: Sequence[tuple[str, float | None]]) -> list[Question]:
    """Of each `--ask`, with the `--at` that follows it, or at the end. Raises ValueError for a time below 0."""
    return [_checked(text, END if at is None else at, "--ask") for text, at in asked]


def of_file(file: str | Path) -> list[Question]:
    """Of a JSONL file: `question` and `at`, seconds; without `at`, at the end. Raises ValueError naming the line."""
    found = []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_of_json(line, f"{file}:{number}"))
    if not found:
        raise ValueError(f"{file} holds no question; a line is {EXAMPLE}")
    return found


def of_line(line: str) -> Question | None:
    """Of a line of the standard input: a text, asked now, or an object as in a file; None of an empty line. Raises
    ValueError for an object that is no question."""
    line = line.strip()
    if not line:
        return None
    return _of_json(line, "a line of the standard input") if line.startswith("{") else Question(line)


EXAMPLE = '{"at": 120, "question": "What ...?"}'


def _of_json(line: str, where: str) -> Question:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} must be {EXAMPLE}: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("question"), str):
        raise ValueError(f"{where} must be {EXAMPLE}, got {line.strip()[:80]}")
    if unknown := set(content) - {"at", "question"}:
        raise ValueError(f"{where} must be {EXAMPLE}, but has the key {min(unknown)!r}")
    return _checked(content["question"], content.get("at", END), where)


def _checked(text: str, at: Any, where: str) -> Question:
    if not text.strip():
        raise ValueError(f"{where}: a question must not be empty")
    if isinstance(at, bool) or not isinstance(at, int | float) or not at >= 0:
        raise ValueError(f"{where}: a question is asked at 0 seconds or later, got {at!r}")
    return Question(text, float(at))
