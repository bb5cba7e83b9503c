"""Which frames are kept as keyframes, and which of them a window takes for anchors."""

import dataclasses

import numpy as np
import pytest

from tests.geometry.room import picture
from vlmem_jax.geometry.walk import Kept, Walk

SLOTS = 4


def frame(number, place, looks=(0.0, 0.0, 1.0)):
    """One frame, taken from `place` on the x axis."""
    camera = np.array([[place, 0.0, 0.0]])
    return Kept(picture(number)[None], np.array([number]), (camera + looks)[None], np.ones((1, 1)), camera)


def keys(*places):
    kept = Kept.empty(SLOTS, 1, 2, 2)
    for number, place in enumerate(places):
        kept = kept.with_key(frame(number, place))
    return kept


def kept_numbers(kept):
    return kept.numbers_F[kept.filled_F].tolist()


def walk_with(kept, recent):
    """A walk whose newest frames are these."""
    walk = Walk.empty(len(recent.numbers_F), SLOTS, 1, 2, 2)
    return dataclasses.replace(walk, keys=kept, recent=recent)


def test_there_is_room_for_the_first_keyframes():
    kept = keys(0, 0, 0, 0)
    assert kept_numbers(kept) == [0, 1, 2, 3]
    np.testing.assert_array_equal(kept.pictures_FHWc, [picture(number) for number in range(4)])


@pytest.mark.parametrize(
    "places, left",
    [
        ((0, 1, 2, 3, 4), [0, 2, 3, 4]),
        ((0, 5, 6, 9, 20), [0, 1, 3, 4]),
        ((0, 10, 20, 30, 31), [0, 1, 2, 3]),
        ((0, 10, 20, 30, 0), [0, 1, 2, 3]),
        ((0, 10, 20, 30, 100), [0, 2, 3, 4]),
    ],
    ids=["even", "a pair", "the new one", "a return", "onward"],
)
def test_then_the_later_of_the_nearest_two_goes(places, left):
    assert kept_numbers(keys(*places)) == left


def test_frames_that_look_elsewhere_are_not_near():
    there = frame(9, 0.0).apart(frame(0, 1.0, looks=(0, 0, 1)) + frame(1, 0.0, looks=(0, 0, -1)))
    np.testing.assert_allclose(there, [[2.0, 2.0]])
    assert frame(9, 0.0).apart(frame(0, 0.1, looks=(0, 0, 1))) < frame(9, 0.0).apart(frame(1, 0.0, looks=(1, 0, 0)))


@pytest.mark.parametrize(
    "place, count, wanted", [(11, 2, [1, 2]), (29, 2, [2, 3]), (29, 1, [3]), (11, 0, []), (0, 9, [0, 1, 2, 3])]
)
def test_anchors_are_the_nearest_in_the_order_of_time(place, count, wanted):
    assert kept_numbers(walk_with(keys(0, 10, 20, 30), frame(9, place)).anchors(count)) == wanted


def test_a_frame_of_the_window_is_no_anchor_of_it():
    walk = walk_with(keys(0, 10, 20), frame(1, 10) + frame(2, 20) + frame(3, 20))
    assert kept_numbers(walk.anchors(2)) == [0]
    assert kept_numbers(walk_with(keys(0), frame(0, 0)).anchors(2)) == []


def test_anchors_are_those_near_the_newest_frame_that_has_a_place():
    unknown = dataclasses.replace(frame(11, 30), weights_FP=np.zeros((1, 1)))
    assert kept_numbers(walk_with(keys(0, 10, 20, 30), frame(9, 1) + frame(10, 11) + unknown).anchors(1)) == [1]
    nothing = dataclasses.replace(frame(10, 0), weights_FP=np.zeros((1, 1)))
    assert kept_numbers(walk_with(keys(0, 10, 20, 30), nothing + unknown).anchors(1)) == [3]


def test_a_new_world_forgets_what_was_before():
    walk = walk_with(keys(0, 10), frame(5, 0) + frame(6, 0)).begin_world(6)
    assert kept_numbers(walk.keys) == [] and kept_numbers(walk.recent) == [6]
    assert not walk.keys.known_F.any() and walk.recent.known_F.tolist() == [False, True]
    assert walk.worlds == 1 and walk.last_key == -1


def test_keyframes_keep_their_distance_in_time():
    walk = Walk.empty(3, SLOTS, 1, 2, 2)
    for number in range(12):
        walk = walk.with_picture(picture(number))
        weight = 0.0 if number in (0, 5) else 1.0  # these have no place that is known
        walk = walk.with_places(np.zeros((1, 1, 3)), np.full((1, 1), weight), np.zeros((1, 3)), keyframe_every=4)
    assert kept_numbers(walk.keys) == [1, 6, 10]


def test_frames_of_another_size():
    with pytest.raises(ValueError, match=r"must keep their shape \(2, 2, 3\), got \(2, 4, 3\)"):
        Walk.empty(3, SLOTS, 1, 2, 2).with_picture(np.zeros((2, 4, 3), np.uint8))
