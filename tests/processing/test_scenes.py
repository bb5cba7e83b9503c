"""Where a video cuts."""

import numpy as np
import pytest

from vlmem_jax.processing.scenes import SceneCuts, difference, resized, small_size, to_hsv


def cuts(scores, quiet=3):
    """The cuts of frames with these scores, and the frames at which they are told."""
    found = SceneCuts(quiet, threshold=10)
    told = [found.push_score(score) for score in scores]
    return [cut for cut in told if cut is not None], [n for n, cut in enumerate(told) if cut is not None]


def frames(*at, count=30):
    return [20.0 if n in at else 0.0 for n in range(count)]


def test_cuts_that_follow_each_other_closely_are_one():
    assert cuts(frames(5, 12)) == ([5, 12], [5, 12])
    assert cuts(frames(2)) == ([], []), "too early"
    assert cuts(frames(5, 7)) == ([5], [5]), "a flash"
    assert cuts(frames(5, 7, 9, 11)) == ([5, 11], [5, 14]), "told once it is quiet"


def test_no_cut_comes_before_the_horizon():
    rng = np.random.default_rng(0)
    for _ in range(300):
        found, horizon = SceneCuts(quiet=5, threshold=10), 0
        for score in np.where(rng.random(120) < rng.choice([0.02, 0.2, 0.5]), 20.0, 0.0):
            cut = found.push_score(score)
            assert cut is None or cut >= horizon
            horizon = max(horizon, found.horizon)
            assert found.frames - found.horizon <= 5 or found._is_merging


def test_colours_are_those_of_opencv():
    """By its own documentation: H of 180, rounded; red, green, blue, grey, black, and a dark orange."""
    rgb = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90), (0, 0, 0), (64, 32, 0), (255, 0, 1)]
    hsv = [(0, 255, 255), (60, 255, 255), (120, 255, 255), (0, 0, 90), (0, 0, 0), (15, 255, 64), (0, 255, 255)]
    assert to_hsv(np.array([rgb], np.uint8)).tolist() == [list(map(list, hsv))]


def test_wide_frames_are_shrunk():
    frame = np.repeat(np.arange(512, dtype=np.uint16)[None] // 2, 4, 0).astype(np.uint8)[..., None].repeat(3, -1)
    small = resized(frame, *small_size(*frame.shape[:2]))
    assert small.shape == (2, 256, 3) and small[0, :, 0].tolist() == list(range(256))
    narrow = frame[:, :255]
    assert resized(narrow, *small_size(*narrow.shape[:2])) is narrow
    assert resized(np.full((720, 1280, 3), 77, np.uint8), 144, 256).tolist() == np.full((144, 256, 3), 77).tolist()
    assert small_size(1, 4000) == (1, 256)


def test_a_size_that_changes_is_no_cut():
    """As where a sender lowers its resolution: the same picture goes on, at half the width, then at twice."""
    ramp = np.indices((48, 64)).sum(0).astype(np.uint8)[..., None].repeat(3, -1) * 2
    other = 255 - ramp
    cuts = SceneCuts(quiet=1)
    for frame in (ramp, ramp[::2, ::2], ramp.repeat(2, 0).repeat(2, 1), ramp[:, :-4]):
        assert cuts.push(frame) is None and cuts.score < 5
    assert cuts.push(other[::2, ::2]) == 4


def test_a_difference_is_the_mean_of_three():
    one, other = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    other[0, 0] = 170, 30, 10
    assert difference(one, other) == difference(other, one) == pytest.approx((170 + 30 + 10) / 4 / 3)
