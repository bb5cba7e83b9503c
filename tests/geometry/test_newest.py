"""Geometry is made once of a clip, as long as that is among the newest."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vlmem_jax.geometry.newest import Newest
from vlmem_jax.types import Geometry


class Seer:
    """Tells a clip by its first number."""

    digest = "seer"

    def __init__(self):
        self.seen, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, pixels):
        self.seen.append(n := int(pixels.flat[0]))
        assert self.go.wait(60)
        if n == 255:
            raise ValueError("nothing to be seen")
        return Geometry(*(np.full((len(pixels), 1, size), n, np.float32) for size in (1, 1, 3)))


def clip(n):
    return np.full((2, 4, 4, 3), n, np.uint8)


def numbers(found):
    return [int(one.coords_BN3.flat[0]) for one in found]


def test_the_newest_clips_are_seen_once():
    seer = Seer()
    newest = Newest(seer, kept=2)
    asked = [1, 2, 1, 1, 3, 1]
    assert numbers([newest(clip(n)) for n in asked]) == asked
    assert seer.seen == [1, 2, 3] and newest.digest == "seer"
    newest(clip(2))  # it had to give way to the third
    newest(clip(1)[:1])  # of other frames
    assert seer.seen == [1, 2, 3, 2, 1]


def test_of_a_clip_that_several_threads_ask_of_the_first_makes_it():
    seer = Seer()
    seer.go.clear()
    newest = Newest(seer)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(newest, clip(n)) for n in (1, 1, 1, 2)]
        while len(seer.seen) < 2:
            threading.Event().wait(0.01)
        seer.go.set()
        found = [one.result() for one in asked]
    assert sorted(seer.seen) == [1, 2] and numbers(found) == [1, 1, 1, 2]


def test_what_goes_wrong_is_told_whoever_asks():
    newest = Newest(Seer())
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing to be seen"):
            newest(clip(255))
