import pytest

from vlmem_jax.demo.dataset import Asked
from vlmem_jax.demo.evaluate import Answered, accuracies, interval, tally


def answered(images: int, grid: tuple[int, int], image: int, right: bool) -> Answered:
    asked = Asked(("x.png",) * images, grid, image, 0, 0, "?", "7")
    return Answered(asked, "7" if right else "1")


def test_answers_are_counted_by_grid_number_and_place():
    tallies = tally(
        [
            answered(1, (1, 1), 0, True),
            answered(1, (2, 2), 0, False),
            answered(4, (1, 1), 0, True),
            answered(4, (1, 1), 3, False),
            answered(4, (2, 1), 1, True),  # a length that training never had counts for itself alone
        ]
    )
    assert tallies["single_image"] == [1, 2]
    assert tallies["multi_image"] == [1, 2]
    assert tallies["by_grid"] == {"1x1": [1, 1], "2x1": [0, 0], "1x2": [0, 0], "2x2": [0, 1]}
    assert tallies["by_images"] == {"1": [1, 1], "2": [0, 0], "3": [0, 0], "4": [1, 2]}
    assert tallies["by_position"] == {"first": [1, 1], "middle": [0, 0], "last": [0, 1]}
    assert tallies["by_place_of_four"] == {"1": [1, 1], "2": [0, 0], "3": [0, 0], "4": [0, 1]}
    assert tallies["untrained_length"] == [1, 1]
    shares = accuracies(tallies)
    assert shares["single_image"] == 0.5
    assert shares["by_grid"]["2x1"] is None


def test_an_answer_must_be_the_digit_and_nothing_else():
    asked = Asked(("x.png",), (1, 1), 0, 0, 0, "?", "7")
    assert Answered(asked, "7").right
    assert not Answered(asked, "7 7").right


def test_intervals_are_those_of_wilson():
    low, high = interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert interval(0, 0) == (0.0, 1.0)
