"""Answers about long videos, read as loosely as where published numbers come from."""

import pytest

from vlmem_jax.scoring import answers
from vlmem_jax.scoring.videos import holds, letter, verdict


def test_the_first_letter_of_any_word():
    assert (letter("The answer is B"), letter("(b)"), letter("13"), letter(None)) == ("T", "B", "", "")


@pytest.mark.parametrize(
    ("output", "reference", "loosely", "strictly"),
    [
        ("13", "1", 1.0, 0.0),
        ("none of them", "no", 1.0, 0.0),
        ("no", "no", 1.0, 1.0),
        ("b", "no", 1.0, 1.0),
        ("B.", "no", 0.0, 1.0),
        ("", "no", 0.0, 0.0),
    ],
)
def test_what_is_held_is_more_than_what_is_meant(output, reference, loosely, strictly):
    choices = ["1", "no", "13", "3"]
    assert holds(output, reference, choices) == loosely
    assert answers.choice(output, reference, choices) == strictly


def test_a_letter_beyond_the_choices_is_none():
    assert holds("c", "x", ["x", "y"]) == 0.0 and holds("b", "y", ["x", "y"]) == 1.0


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("I think {'pred': 'yes', 'score': 4}, since", (True, 4)),
        ('{"pred": "YES", "score": "5"}', (True, 5)),
        ("{'pred': 'yes', 'score': 10}", (True, 0)),
        ("{'pred': 'yes', 'score': -3}", (True, 0)),
        ("{'pred': 'yes please', 'score': 3}", (False, 3)),
        ("{'pred': 'yes\", 'score': 3}", (False, 3)),
        ("__import__('os')", (False, 0)),
        (None, (False, 0)),
    ],
)
def test_what_a_judge_says(said, found):
    assert verdict(said) == found
