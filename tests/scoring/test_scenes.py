"""Answers about scenes, equal where ScanQA and SQA3D take them as equal."""

import pytest

from vlmem_jax.scoring import RewardConfig, Rewards
from vlmem_jax.scoring.scenes import clean, exact_match


@pytest.mark.parametrize(
    ("answer", "cleaned"),
    [
        ("  On  the left side. ", "on left side"),
        ("4", "four"),
        ("4 chairs", "four chairs"),
        ("21", "21"),
        ("23", "twenty-three"),
        ("None", "zero"),
        ("a brown, wooden table!", "brown, wooden table"),
        ("An apple and a pear", "apple and pear"),
        ("the", "the"),
        ("plan the", "plan the"),
        ("the 2 beds", "two beds"),
        ("rigth, behine", "right, behind"),
        ("3 oclock", "three o'clock"),
        ("3 o' clock", "three o'clock"),
        ("mat2", "mat"),
        ("table12", "table12"),
        ("backwards", "backward"),
        ("L-shaped: yes", "l-shaped: yes"),
        ("café ç", "caf "),
        ("white .", "white "),
    ],
)
def test_cleaning(answer, cleaned):
    assert clean(answer) == cleaned


def test_an_answer_must_be_one_of_those_accepted_as_a_whole():
    assert exact_match("The TV.", "tv") == 1.0
    assert exact_match("2", "two") == 1.0
    assert exact_match("a brown table", "table") == 0.0


class Asked:
    name, answer_type, choices = "a:1", "text", ()
    answers = ("on the desk", "Desk")


@pytest.mark.parametrize(("output", "score"), [("desk", 1.0), ("On desk.", 1.0), ("the desks", 0.0), ("", 0.0)])
def test_as_a_reward_the_best_answer_counts(output, score):
    assert Rewards([RewardConfig("em")]).score(output, Asked) == score
