import numpy as np
import pytest

from vlmem_jax.demo.cameras import MOTIONS, draw_path, glances
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.rooms import MOST, draw_room, render


@pytest.mark.parametrize("frames", [8, 24, 96])
def test_every_poster_is_glanced_at_once_and_shortly(frames):
    for seed in range(20):
        shown_T = glances(np.random.default_rng(seed), MOST, frames)
        assert shown_T[0] == -1
        for poster in range(MOST):
            at = np.flatnonzero(shown_T == poster)
            assert 1 <= len(at) <= 2 and at[-1] - at[0] == len(at) - 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_short_video_shows_every_poster(motion):
    rng, pool = np.random.default_rng(0), load_digits()[0]
    for _ in range(5):
        room = draw_room(rng, pool)
        seen = render(room, draw_path(rng, room, motion, 8))
        largest = [(seen.posters_TSS == number).sum((1, 2)).max() for number in range(len(room.posters))]
        assert min(largest) > (250 if motion == "dwell" else 24)


def test_a_camera_that_dwells_sees_nearly_the_same_all_the_time():
    rng = np.random.default_rng(1)
    room = draw_room(rng, load_digits()[0])
    for motion, alike in (("dwell", 80), ("scan", 3)):
        pixels = render(room, draw_path(rng, room, motion, 96)).pixels_TSSc.astype(float)
        assert (np.abs(pixels - pixels[0]).mean((1, 2, 3)) < 12).sum() == pytest.approx(alike, abs=alike / 5 + 8)
