"""First tokens say an answer, and how sure it is."""

import math

import pytest

from vlmem_jax.agent import gates


def test_prose_is_no_label():
    """The article counts for A where case does not matter, "Answer" only in the release."""
    tokens = [("Answer", -0.1), (" a", -1.0), (" B", -2.0)]
    assert gates.strict(tokens, "AB").probabilities == {"A": 0.0, "B": 1.0}
    assert gates.strict(tokens, "AB", exact_case=False).label == "A"
    assert gates.by_first_letter(tokens, "AB").probabilities["A"] > 0.8


def test_a_token_that_was_drawn_counts_once():
    tokens = gates.with_drawn(("B", -1.0), [("A", -1.0), ("B", -1.0)])
    assert sorted(tokens) == [("A", -1.0), ("B", -1.0)]
    assert gates.with_drawn(("C", -3.0), [("A", -1.0)]) == [("C", -3.0), ("A", -1.0)]


def test_nothing_said_is_not_certainty():
    belief = gates.strict([("The", -0.1)], "ABCD")
    assert belief.mass == 0 and belief.entropy == pytest.approx(math.log(4))
    assert belief.entropy > gates.bound(4)
    assert gates.by_first_letter([("The", -0.1)], "ABCD").entropy == 0, "in the release it is"


@pytest.mark.parametrize("options", [2, 3, 5, 26])
def test_the_bound_grows_with_what_there_is_to_choose_from(options):
    assert gates.bound(4) == gates.bound(4, scaled=False) == 0.72
    share = gates.bound(options) / math.log(options)
    assert share == pytest.approx(0.72 / math.log(4))


def test_stages_that_add_nothing():
    assert gates.stop([1.0, 1.0, 1.0], 0.1) == (2, "exhausted")
    assert gates.stop([1.0, 1.0, 1.0], 0.1, 0.01, 2) == (2, "plateau")
    assert gates.stop([1.0, 0.5, 0.5], 0.5, 0.01, 1) == (1, "entropy")


def test_letters_of_options():
    assert gates.with_letters(["A man walks", "B"]) == ["A. A man walks", "B. B"]
    assert gates.with_letters(["(A) red", "(B) blue"]) == ["A. red", "B. blue"]
    assert gates.with_letters(["A. red", "blue"]) == ["A. A. red", "B. blue"]
    with pytest.raises(ValueError, match="26 options, got 27"):
        gates.with_letters(["x"] * 27)
