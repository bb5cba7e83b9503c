"""Questions about long videos name what they are asked of."""

import pytest

from vlmem_jax.data.long_videos import Shot, frames_of_seconds, frames_of_shots, in_order, named, option_letter, shot_of


def test_videos_are_ordered_by_number_and_keep_their_names():
    inputs = {
        "video 10": {"id": "ten"}, "image 1": {"id": "two"}, "video 2": {"id": "two", "start_time": 1.5},
        "audio 3": {"id": "x"}, "video 4": {"start_time": 0}, "video 5": {"id": 7}, "video": {"id": "x"},
        "video 6": None,
    }  # fmt: skip
    assert list(named(inputs)) == ["video 10", "image 1", "video 2"]
    assert in_order(named(inputs)) == {"video 2": "two", "video 10": "ten", "image 1": "two"}
    assert list(in_order(named(inputs))) == ["video 2", "video 10", "image 1"]


@pytest.mark.parametrize(("index", "letter"), [(-1, ""), (0, "A"), (25, "Z"), (26, "")])
def test_letters(index, letter):
    assert option_letter(index) == letter


def test_no_second_after_a_question_is_shown():
    names = ["10.jpg", "000003.jpg", "000001.jpg", "000002.jpg", "cover.jpg", "²³.jpg"]
    assert frames_of_seconds(names, 0, 1.9) == ["000001.jpg", "000002.jpg"]
    assert frames_of_seconds(names, 2, 9) == ["000003.jpg", "10.jpg"]
    assert frames_of_seconds(names, 5, 4) == []


def test_shots_are_ordered_by_number():
    names = [f"film/shot_{shot:04d}_img_{image}.jpg" for shot in (1, 0) for image in (10, 9)]
    assert shot_of(names[0]) == Shot(1, 10) and shot_of("shot_1_img_") is None
    assert frames_of_shots(names, None, Shot(1, 9)) == [names[3], names[2], names[1]]
    assert frames_of_shots(names, Shot(0, 10), None) == [names[2], names[1], names[0]]
    assert frames_of_shots([*names, "x.jpg"], None, None) == names[::-1]
