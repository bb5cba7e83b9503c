"""Questions about mosaics in plain words, and conversations made of many short ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from vlmem_jax.demo.mosaics import Mosaic
from vlmem_jax.processing.chat import IMAGE_MARKER

Kind = Literal["cell", "row", "column", "all"]
TURN_TOKENS = 4
"""Control tokens that open and close the two sides of a turn."""
SHORTEST = TURN_TOKENS + 4
"""Tokens of the shortest turn, a question about a cell."""
DRAWS = 60
"""Questions drawn at most to fill a conversation."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, its answer, and how many tokens the two take."""

    text: str
    answer: str
    tokens: int


def ask(kind: Kind, image: int, digits_RC: Int[np.ndarray, "R C"], row: int, column: int) -> Question:
    """The question of this kind about image number `image`; all three numbers count from 0."""
    words = 2
    if kind == "cell":
        text, digits, words = f"which digit is at row {row + 1}, column {column + 1}?", digits_RC[row, column], 3
    elif kind == "row":
        text, digits = f"which digits are in row {row + 1}?", digits_RC[row]
    elif kind == "column":
        text, digits = f"which digits are in column {column + 1}?", digits_RC[:, column]
    else:
        text, digits = "what are all the digits?", digits_RC
    digits = digits.ravel()
    answer = " ".join(map(str, digits))
    return Question(f"In image {image + 1}, {text}", answer, TURN_TOKENS + words + len(digits))


def opening(images: Sequence[Any]) -> list[Any]:
    """The parts of a message that stand before the first question: the images, each under its name."""
    return [part for n, image in enumerate(images) for part in (f"image {n + 1}: ", image, "\n")]


def conversation(images: int, questions: Sequence[Question]) -> list[dict[str, str]]:
    """The `conversations` of a JSONL line about this many images."""
    turns = []
    for question in questions:
        text = question.text if turns else "".join(opening([IMAGE_MARKER] * images)) + question.text
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": question.answer}]
    return turns


def fill(rng: np.random.Generator, mosaics: Sequence[Mosaic], kinds: Sequence[Kind], tokens: int) -> list[Question]:
    """Different questions of these kinds that take at most `tokens`, and nearly as many; at least one.

    `all` is asked of images of a single tile only.
    """
    questions: dict[str, Question] = {}
    left = tokens
    for which, what, down, right in rng.random((DRAWS, 4)).tolist():
        image = int(which * len(mosaics))
        mosaic = mosaics[image]
        fitting = kinds if mosaic.grid == (1, 1) else [kind for kind in kinds if kind != "all"]
        rows, columns = mosaic.digits_RC.shape
        kind = fitting[int(what * len(fitting))]
        question = ask(kind, image, mosaic.digits_RC, int(down * rows), int(right * columns))
        if question.text not in questions and (question.tokens <= left or not questions):
            questions[question.text] = question
            left -= question.tokens
        if left < SHORTEST:
            break
    return list(questions.values())
