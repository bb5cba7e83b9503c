"""What counts as an answer, and as the same answer: one table for each kind, with what stays 0 on purpose."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmem_jax.scoring.answers import choice, exact, extract_answer, number, option, parse_number, substr, text

ANIMALS = ["cat", "dog", "blue bird", "none"]


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("so <answer>1</answer>, no: <answer> 2\n</answer> Answer: 3", "2"),
        ("<answer>B", "B"),
        (r"first \boxed{1}, then \boxed{\frac{3}{4}} \boxed{open", r"\frac{3}{4}"),
        (r"\boxed{1} Answer: 3", "3"),
        (r"The answer is $\boxed{\text{red}}$.", "red"),
        ("Answer: 1\nAnswer: B) red\nfor I see it", "B) red"),
        ("The answer is not red. The answer is blue", "blue"),
        ("<think>The answer is 3</think>It is 4", "It is 4"),
        ("<think>The answer is 3", ""),
        ("It is large.\n\n Paris \n\n", "Paris"),
        ("", ""),
    ],
)
def test_the_answer_is_found_in_the_output(output, answer):
    assert extract_answer(output) == answer


SECOND = [
    *("B", "b", "(B)", "[B]", "B.", "B;", "b)", "B) dog", "B. dog", "B - dog", "**B**", "$B$", r"\(B\)", "\uff22"),
    *("Option B", "option (b)", "The answer is (b).", "The correct answer is B.", "The correct answer is (B)."),
    *("**Answer:** B", "**Answer**: B", "Final answer: B", "FINAL ANSWER: b", "Answer\uff1aB", "Answer = B"),
    *("B\nBecause it barks.", "B. dog\n\nExplanation: it barks.", "B is correct", "B is the right answer."),
    *("I choose B", "It's B", "I think it is B.", "So I would say (B)", "A is a cat, so it must be B"),
    *(r"\boxed{B}", r"\boxed{\text{B}}", "<think>A?</think>B", "<answer>B", "<answer>B</answer>"),
    *("\u7b54\u6848\uff1aB", "\u7b54\u6848\u662fB", "\u9009B", "\u6b63\u89e3\u306fB", "\uc815\ub2f5\uc740 B"),
    *("La respuesta es B", "La r\u00e9ponse est B.", "Die Antwort ist B.", "A resposta \u00e9 B"),
    "\u041e\u0442\u0432\u0435\u0442: B",
    *("dog", "Dog.", "a dog", "It is a dog.", "It's the dog!", '"dog"', "The animal here is a dog.", "B (dog)"),
    *("Answer: dog", "The answer is the dog.", "First I see A, then C.\nAnswer: B"),
    "Looking at the ears, not a cat.\nB",
]  # fmt: skip


@pytest.mark.parametrize("output", SECOND)
def test_an_option_is_named_in_many_ways(output):
    assert choice(output, "B", ANIMALS) == 1
    assert choice(output, "dog", ANIMALS) == 1
    assert choice(output, "(B) dog", ANIMALS) == 1
    assert choice(output, "A", ANIMALS) == choice(output, "C", ANIMALS) == 0


@pytest.mark.parametrize(
    "output",
    [
        *(
            "",
            "bees",
            "E",
            "(F)",
            "AB",
            "A tall one",
            "cats",
            "<think>B",
            "B or C",
            "A and B",
            "(A), (B)",
            "A, B",
            "A/B",
        ),
        *("Both A and B", "The answer is A or B", r"\boxed{A, B}", "B. cat", "cat or dog", "It is not a dog."),
        *("I cannot tell.", "A bird is a bird", "dogma", "It is neither a cat nor a dog"),
    ],
)
def test_what_names_no_option_or_two_is_none(output):
    assert option(output, ANIMALS) is None
    assert all(choice(output, letter, ANIMALS) == 0 for letter in "ABCD")


def test_letters_without_choices():
    assert choice("I take C.", "C") == 1 and choice("C", "(c)") == 1 and choice("B", "C") == 0
    assert choice("red", "red") == 1, "a reference that names no option is a text"


NUMBERS = [
    # as it is written
    ("1,234.5 km", "1234.5", 1),
    ("1 000", "1000", 1),
    ("1'000'000", "1000000", 1),
    ("12,34,567", "1234567", 1),
    ("3,5", "3.5", 1),
    ("12.5%", "12.5", 1),
    ("50%", "0.5", 1),
    ("0.5", "50%", 1),
    ("50 per cent", "50%", 1),
    ("50", "50%", 1),
    (r"$\frac{3}{4}$", "0.75", 1),
    (r"1\frac{1}{2}", "1.5", 1),
    ("\u00bd", "0.5", 1),
    ("1\u00bd", "1.5", 1),
    ("1 1/2", "1.5", 1),
    ("3/4 cup", "0.75", 1),
    ("0.333", "1/3", 1),
    ("-3", "-3", 1),
    ("\u22123 m/s", "-3", 1),
    ("\u20135", "-5", 1),
    ("0.0", "0", 1),
    ("3.0", "3", 1),
    ("1e3", "1000", 1),
    ("10^3", "1000", 1),
    ("2.5 x 10^3", "2500", 1),
    ("1 thousand", "1000", 1),
    ("2.5 million people", "2500000", 1),
    ("three", "3", 1),
    ("zero", "0", 1),
    ("twenty-one", "21", 1),
    ("one hundred and five", "105", 1),
    ("two thousand three hundred", "2300", 1),
    ("minus seven", "-7", 1),
    ("\u4e09", "3", 1),
    ("\u4e8c\u5341\u4e00", "21", 1),
    ("12:45", "12:45", 1),
    ("It is 12:45.", "12:45", 1),
    ("5 m^2", "5", 1),
    ("$5.00", "5", 1),
    ("3rd", "3", 1),
    # which one it is
    ("There are 2 red and 1 blue cups, 3 in total.", "3", 1),
    ("2+1=3", "3", 1),
    ("The answer is 3, for 2 and 1 make 3 and 4 does not.", "3", 1),
    ("Answer: 3 of 5", "3", 1),
    ("<think>4</think>3", "3", 1),
    (r"so \boxed{3} and not 4", "3", 1),
    ("**3**", "3", 1),
    # only decimals are taken roughly
    ("1.0005", "1.0", 1),
    ("3.1415", "3.14159", 1),
    # on purpose not
    ("1.01", "1.0", 0),
    ("2024", "2023", 0),
    ("1000.9", "1000", 0),
    ("100001", "100000", 0),
    ("12:45", "12:30", 0),
    ("12:45", "12.75", 0),
    ("1245", "12:45", 0),
    ("-3", "3", 0),
    ("3 or 4", "3", 0),
    ("The answer is 3 or 4", "3", 0),
    ("many", "3", 0),
    ("1/0", "3", 0),
    ("10^99999", "3", 0),
    ("", "3", 0),
    ("3", "many", 0),
]


@pytest.mark.parametrize(("output", "reference", "same"), NUMBERS)
def test_numbers_are_compared_as_numbers(output, reference, same):
    assert number(output, reference) == same


@given(st.integers(-(10**12), 10**12))
def test_whole_numbers_are_exact_however_they_are_grouped(value):
    assert parse_number(str(value)).value == value == parse_number(f"{value:,}").value
    assert number(f"It is {value:,}.", str(value)) == 1
    assert number(str(value + 1), str(value)) == 0


@given(st.text(max_size=60), st.sampled_from(["3", "B", "0.5", "dog"]))
def test_any_text_has_a_score(output, reference):
    for compare in (number, text, choice):
        assert compare(output, reference) in (0.0, 1.0)
    assert option(output, ANIMALS) in (None, "A", "B", "C", "D")


@pytest.mark.parametrize(
    ("output", "reference", "same"),
    [
        ("It is large.\nParis", "paris", 1),
        ("Paris.", "Paris", 1),
        ("**Paris**", "Paris", 1),
        ("\u201cParis\u201d", "Paris", 1),
        ("The answer is Paris. It lies in France.", "Paris", 1),
        ("the red car", "Red car", 1),
        ("\uff30aris", "paris", 1),
        ("<think>Rome?</think> Paris", "Paris", 1),
        ("St. Louis", "St. Louis", 1),
        ("a", "A", 1),
        ("Paris, France", "Paris", 0),
        ("Not Paris", "Paris", 0),
        ("12.50", "12.5", 0),
        ("", "Paris", 0),
    ],
)
def test_texts_are_compared_without_what_is_no_word(output, reference, same):
    assert text(output, reference) == same


def test_released_metrics_stay_as_they_are():
    assert exact("It is\nthe  Cat", "it is the cat") == 1 and exact("Cat.", "cat") == 0 == exact("cat", None)
    assert substr("anything", "") == 1 and substr("A Cat!", "cat") == 1 and substr("a", None) == 0


def test_numbers_that_are_too_large_or_small_to_write():
    assert parse_number("1e-3").value == Fraction(1, 1000)
    assert parse_number("9" * 500).value > 10**499
