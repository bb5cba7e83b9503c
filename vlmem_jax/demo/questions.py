"""Questions about mosaics in plain words, and conversations made of many short ones."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

from vlmem_jax.demo.mosaics import Mosaic

Kind = Literal["cell", "row", "column", "all"]
TURN_TOKENS = 4
"""Control tokens that open and close the two sides of a turn."""
SHORTEST = TURN_TOKENS + 3
"""Tokens of the shortest turn, a question about a cell of the only image."""
DRAWS = 60
"""Questions drawn at most to fill a conversation."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, its answer, and how many tokens the two take."""

    text: str
    answer: str
    tokens: int


def ask(kind: Kind, image: int | None, digits_RC: Int[np.ndarray, "R C"], row: int, column: int) -> Question:
    """The question of this kind about image number `image`, or about the only one; numbers count from 0."""
    if kind == "cell":
        text, words, digits = f"which digit is at row {row + 1}, column {column + 1}?", 2, digits_RC[row, column]
    elif kind == "row":
        text, words, digits = f"which digits are in row {row + 1}?", 1, digits_RC[row]
    elif kind == "column":
        text, words, digits = f"which digits are in column {column + 1}?", 1, digits_RC[:, column]
    else:
        text, words, digits = "what are all the digits?", 1, digits_RC
    if image is not None:
        text, words = f"in image {image + 1}, {text}", words + 1
    answer = " ".join(map(str, digits.ravel()))
    return Question(text[0].upper() + text[1:], answer, TURN_TOKENS + words + digits.size)


def opening(images: int) -> str:
    """What stands before the first question: the images, each under its name where there are several."""
    if images == 1:
        return "<image>\n"
    return "".join(f"image {n + 1}: <image>\n" for n in range(images))


def conversation(images: int, questions: Sequence[Question]) -> list[dict[str, str]]:
    """The `conversations` of a JSONL line about this many images."""
    turns = []
    for question in questions:
        text = question.text if turns else opening(images) + question.text
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
        named = image if len(mosaics) > 1 else None
        question = ask(kind, named, mosaic.digits_RC, int(down * rows), int(right * columns))
        if question.text not in questions and (question.tokens <= left or not questions):
            questions[question.text] = question
            left -= question.tokens
        if left < SHORTEST:
            break
    return list(questions.values())
