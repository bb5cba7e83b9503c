import numpy as np
import pytest

from vlmem_jax.demo.cameras import draw_path
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.room_questions import (
    IGNORED,
    KEPT,
    PLACES,
    TYPES,
    Facts,
    conversation,
    fill,
    questions,
)
from vlmem_jax.demo.rooms import NAMES, Path, draw_room, render
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.processing import Tokenizer

FACTS = Facts(
    colours=("red", "green", "blue", "pink"),
    digits=(3, 1, 4, 1),
    pixels_N=np.array([400, 300, 280, 10]),
    first_N=np.array([2, 1, 2, 0]),
    left_N=np.array([20.0, 5.0, 3.0, 0.0]),
    middles_N2=np.array([[1.0, 2.0], [-2.0, 1.5], [-1.0, -1.0], [1.0, -2.0]]),
)
"""Red is front right, green front left, blue back left; of pink too little is seen. Green is first, then blue, red."""


def asked(kind):
    return {question.text: question.answer for question in questions(FACTS, kind)}


@pytest.mark.parametrize(
    ("kind", "text", "answer"),
    [
        ("direction", "From where the video begins, in which direction is the blue poster?", "blue back-left"),
        ("distance", "Which is nearer to where the video begins, the red or the blue poster?", "blue"),
        ("order", "Which appears first, the red or the green poster?", "green"),
        ("count", "How many posters are there?", "3"),
        ("digit", "Which digit is written on the green poster?", "green 1"),
        ("seen", "Is there any red poster?", "yes"),
        ("seen", "Is there any orange poster?", "no"),
        ("colours", "Tell me all posters in the order they appear.", "green blue red"),
        (
            "posters",
            "Tell me all posters in the order they appear, and which digit is written on them.",
            "green 1 blue 4 red 3",
        ),
        (
            "directions",
            "Tell me all posters in the order they appear, and in which direction they are.",
            "green front-left blue back-left red front-right",
        ),
        ("far", "How far from where the video begins is the green poster?", "green 2"),
        (
            "distances",
            "Tell me all posters in the order they appear, and how far they are from where the video begins.",
            "green 2 blue 1 red 2",
        ),
    ],
)
def test_the_answer_is_what_the_video_showed(kind, text, answer):
    assert asked(kind)[text] == answer


def test_nothing_is_asked_that_was_hardly_seen_or_cannot_be_told_apart():
    every = {text for kind in (*TYPES, "seen", "far") for text in asked(kind)}
    assert not any("pink" in text for text in every)
    assert "Which appears first, the red or the blue poster?" not in every  # both in one frame
    near = [text for text in asked("distance") if "red" in text and "green" in text]
    assert not near  # 2.2 and 2.5 metres


def test_facts_are_those_of_the_pictures():
    rng = np.random.default_rng(3)
    room = draw_room(rng, load_digits()[0])
    seen = render(room, draw_path(rng, room, "dwell", 24))
    facts = Facts.of(room, seen)
    assert sorted(facts.seen) == list(range(len(room.posters))) == sorted(facts.readable)
    for number, poster in enumerate(room.posters):
        assert facts.colours[number] == NAMES[poster.colour]
        first = facts.first_N[number]
        assert (seen.posters_TSS[first] == number).sum() >= 24
        assert all((seen.posters_TSS[time] == number).sum() < 24 for time in range(first))
    # a camera that turns round sees the other way round
    start = Path(np.array([[2.0, 2.0]]), np.array([0.4]))
    ahead, behind = (
        Facts.of(room, render(room, start._replace(yaws_T=start.yaws_T + turn))).place(0) for turn in (0, np.pi)
    )
    opposite = {"front": "back", "back": "front", "left": "right", "right": "left"}
    assert behind == "-".join(opposite[word] for word in ahead.split("-"))


def test_every_question_takes_as_many_tokens_as_it_says(tmp_path):
    write_tokenizer(tmp_path, KEPT, IGNORED)
    tokenizer = Tokenizer.load(tmp_path)
    for kind in (*TYPES, "seen", "far", "posters", "colours", "directions", "distances"):
        for question in questions(FACTS, kind):
            ids = [tokenizer.encode(text) for text in (question.text, question.answer)]
            assert sum(map(len, ids)) + 4 == question.tokens, question
            assert tokenizer.id("<unk>") not in sum(ids, [])
            assert tokenizer.decode(ids[1]) == question.answer
    assert set(PLACES) <= set(KEPT)


def test_filling_asks_different_questions_and_keeps_within_the_tokens():
    chosen = fill(np.random.default_rng(0), FACTS, ("digit", "direction", "seen"), 100)
    assert len({question.text for question in chosen}) == len(chosen)
    assert 80 < sum(question.tokens for question in chosen) <= 100
    turns = conversation(chosen)
    assert turns[0]["value"].startswith("<video>\n") and "<video>" not in turns[2]["value"]
    assert turns[1] == {"from": "gpt", "value": chosen[0].answer}
