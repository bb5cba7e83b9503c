import numpy as np
import pytest

from vlmem_jax.demo.mosaics import draw_mosaic, load_digits
from vlmem_jax.demo.questions import ask, conversation, fill

DIGITS_RC = np.arange(16).reshape(4, 4) % 10


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("cell", "In image 2, which digit is at row 2, column 4?", "7"),
        ("row", "In image 2, which digits are in row 2?", "4 5 6 7"),
        ("column", "In image 2, which digits are in column 4?", "3 7 1 5"),
        ("all", "In image 2, what are all the digits?", "0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5"),
    ],
)
def test_the_answer_is_what_the_picture_shows(kind, text, answer):
    question = ask(kind, 1, DIGITS_RC, 1, 3)
    assert (question.text, question.answer) == (text, answer)


def test_a_conversation_names_its_images_once():
    turns = conversation(2, [ask("cell", 0, DIGITS_RC, 0, 0), ask("row", 1, DIGITS_RC, 2, 0)])
    assert [turn["from"] for turn in turns] == ["human", "gpt", "human", "gpt"]
    assert turns[0]["value"].startswith("image 1: <image>\nimage 2: <image>\nIn image 1, ")
    assert "<image>" not in turns[2]["value"]


def test_filling_asks_different_questions_and_keeps_within_the_tokens():
    rng = np.random.default_rng(0)
    mosaics = [draw_mosaic(rng, load_digits()[0], (2, 1), 4) for _ in range(2)]
    questions = fill(rng, mosaics, ("all", "row", "column", "cell"), 100)
    texts = [question.text for question in questions]
    assert len(set(texts)) == len(texts)
    assert not any("all" in text for text in texts)  # 32 digits would be too long an answer
    assert 100 - 8 < sum(question.tokens for question in questions) <= 100
