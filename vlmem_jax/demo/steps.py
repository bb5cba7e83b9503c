"""Questions about a mosaic that take several steps to answer, and the dataset of VisMem's demo on disk.

FOLDER/images/train/*.png, images/heldout/*.png    mosaics of 3 x 3 digits
FOLDER/reading.jsonl    conversations to learn to read: transcriptions, rows, columns, cells
FOLDER/steps.jsonl      conversations whose answers write the steps out, to learn to answer
FOLDER/worked.jsonl     one question a line, its answer with the steps: what memories are warmed up on
FOLDER/prompts.jsonl    such questions with the last step alone: what is reinforced
FOLDER/heldout.jsonl    as prompts, of digits that training never sees: the accuracy
FOLDER/tokenizer/
"""

import dataclasses
import itertools
import pathlib
import re
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from vlmem_jax.demo.dataset import Album, reading, write_lines
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.questions import TURN_TOKENS, Question, conversation, opening
from vlmem_jax.demo.tokenizer import words, write_tokenizer

Kind = Literal["sum", "largest"]
KINDS: tuple[Kind, ...] = ("sum", "largest")
TILE = (1, 1)
"""The grid of every picture."""
CELLS = 3
"""Digits along a side of every picture."""
END, MEMORY = ".", ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>")
"""What ends the last step, and the tokens that call for a memory and end it, short and long (VisMem sec. 3)."""
PAUSE = "um"
"""Says nothing: before some steps, so that a model gets used to tokens that are no step, as memories are."""
HESITATION, LONGEST_PAUSE = 0.25, 6
"""How likely a pause is before a step, and how long it may be."""
KEPT = (*(str(n) for n in range(10, 9 * CELLS + 1)), *KINDS, "makes", ";", END, "Answer:", PAUSE, *MEMORY)
"""Tokens that the demo's tokenizer needs besides."""
HEADER_TOKENS = 5 + CELLS**2
"""Before the first question: control tokens, the image's name, the image."""


@dataclasses.dataclass(frozen=True)
class StepsConfig:
    """Sizes of the dataset."""

    pictures: int = 2400
    reading_lines: int = 4800
    steps_lines: int = 4800
    tokens: int = 128
    """Longest conversation."""
    worked: int = 4800
    prompts: int = 1600
    heldout: int = 400
    seed: int = 0


def token_ids(*tokens: str) -> tuple[int, ...]:
    """Ids in the demo's tokenizer."""
    return tuple(words(KEPT).index(token) for token in tokens)


def ask(kind: Kind, digits_RC: Int[np.ndarray, "R C"], axis: Literal["row", "column"], line: int) -> Question:
    """The question of this kind about a row or column, counted from 0; the answer writes out how it is found."""
    digits = (digits_RC[line] if axis == "row" else digits_RC[:, line]).tolist()
    if kind == "sum":
        result, steps = sum(digits), [str(digits[0])]
        sums = itertools.accumulate(digits)
        next(sums)
        steps += [f"{digit} makes {total}" for digit, total in zip(digits[1:], sums, strict=True)]
        text = f"What is the sum of {axis} {line + 1}?"
    else:
        result, steps = max(digits), [str(digit) for digit in digits]
        text = f"What is the largest digit of {axis} {line + 1}?"
    answer = f"{'; '.join(steps)}{END} Answer: {result}"
    spaced = answer.replace(";", " ;").replace(END, f" {END}")
    return Question(text, answer, TURN_TOKENS + 2 + len(spaced.split()))


def hesitating(rng: np.random.Generator, question: Question) -> Question:
    """With pauses in its answer."""
    steps = re.split(r"(?<=[;.]) ", question.answer)
    pauses = rng.integers(1, LONGEST_PAUSE + 1, len(steps)) * (rng.random(len(steps)) < HESITATION)
    answer = " ".join(f"{PAUSE} " * count + step for count, step in zip(pauses, steps, strict=True))
    return dataclasses.replace(question, answer=answer, tokens=question.tokens + int(pauses.sum()))


def final(answer: str) -> str:
    """The last step of an answer."""
    return answer.rpartition("Answer:")[2].strip()


def write_steps(folder: pathlib.Path, config: StepsConfig) -> None:
    """Writes everything into `folder`. The same config gives the same pictures and lines."""
    train, heldout = load_digits()
    rng = np.random.default_rng(config.seed)
    write_tokenizer(folder / "tokenizer", KEPT)
    album = Album(folder, "train", train, {TILE: config.pictures}, rng, CELLS)
    lines = (reading(rng, album, config.tokens) for _ in range(config.reading_lines))
    write_lines(folder / "reading.jsonl", lines)
    write_lines(folder / "steps.jsonl", (_steps(rng, album, config.tokens) for _ in range(config.steps_lines)))
    write_lines(folder / "worked.jsonl", (_worked(_prompt(rng, album)) for _ in range(config.worked)))
    write_lines(folder / "prompts.jsonl", (_prompt(rng, album) for _ in range(config.prompts)))
    album = Album(folder, "heldout", heldout, {TILE: config.heldout}, rng, CELLS)
    write_lines(folder / "heldout.jsonl", (_prompt(rng, album) for _ in range(config.heldout)))


def _all(digits_RC: np.ndarray) -> list[tuple[Kind, Question]]:
    """Every question about a picture."""
    return [
        (kind, ask(kind, digits_RC, axis, line))
        for kind in KINDS
        for axis in ("row", "column")
        for line in range(CELLS)
    ]


def _steps(rng: np.random.Generator, album: Album, tokens: int) -> dict[str, Any]:
    """A conversation of different questions, in any order and with pauses, that nearly fills `tokens`."""
    paths, [mosaic] = album.pick(rng, TILE, 1)
    questions, left = _all(mosaic.digits_RC), tokens - HEADER_TOKENS
    chosen = []
    for n in rng.permutation(len(questions)):
        question = hesitating(rng, questions[n][1])
        if question.tokens <= left:
            chosen.append(question)
            left -= question.tokens
    return {"image": paths, "conversations": conversation(1, chosen)}


def _prompt(rng: np.random.Generator, album: Album) -> dict[str, Any]:
    """One question without its steps."""
    [path], [mosaic] = album.pick(rng, TILE, 1)
    questions = _all(mosaic.digits_RC)
    kind, question = questions[rng.integers(len(questions))]
    return {
        "prompt": [*opening([{"image": path}]), question.text],
        "answer": final(question.answer),
        "answer_type": "number",
        "source": kind,
        "steps": question.answer,
    }


def _worked(prompt: dict[str, Any]) -> dict[str, Any]:
    return {**prompt, "answer": prompt["steps"], "answer_type": "text"}
