"""Who goes first, looking or an answer, by a clock that goes by what is done."""

import pytest

from vlmem_jax.stream import turns
from vlmem_jax.stream.turns import SLOWED, Turns


class World:
    """Frames and pieces take turns on one device, on which a frame takes `alone` seconds."""

    def __init__(self, monkeypatch, crowded=True):
        self.now, self.alone, self.seconds = 0.0, 1.0, []
        monkeypatch.setattr(turns.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(turns, "TICK", 0.0)
        self.crowded = crowded
        self.turns = Turns(self.waiting)

    def frame(self, behind=0.0):
        """One that waits for a piece that the device is at."""
        with self.turns.frame():
            self.now += behind + self.alone
        self.seconds.append(behind + self.alone)

    def waiting(self):
        """Where frames wait, the next one is looked at."""
        if self.crowded:
            self.frame()
        return self.crowded

    def answer(self, pieces, each):
        """Each piece lets a frame wait for so long."""
        for n in range(pieces):
            if self.crowded:
                self.frame(each)
            else:
                self.now += each
            yield str(n)


@pytest.mark.parametrize("each", [0.1, 3.0, 40.0])
def test_frames_that_wait_behind_one_another_take_no_longer_than_their_share(monkeypatch, each):
    world = World(monkeypatch)
    for _ in range(5):
        world.frame()
    world.seconds.clear()
    said = list(world.turns.pieces(world.answer(20, each)))
    mean = sum(world.seconds) / len(world.seconds) / world.alone
    assert said == [str(n) for n in range(20)]
    assert mean == pytest.approx(min(1 + each, SLOWED), rel=0.05)  # and an answer does not wait for longer


def test_where_no_frame_waits_an_answer_does_not(monkeypatch):
    world = World(monkeypatch, crowded=False)
    world.frame()
    for n, _ in enumerate(world.turns.pieces(world.answer(20, 3.0)), 1):
        assert world.now == 1.0 + 3.0 * n


def test_the_first_piece_comes_at_once(monkeypatch):
    world = World(monkeypatch)
    world.frame()
    world.seconds.clear()
    assert next(world.turns.pieces(world.answer(20, 40.0))) == "0" and world.seconds == [41.0]


def test_an_answer_ends_though_something_else_slows_the_devices(monkeypatch):
    """It does not wait for what will not be."""
    world = World(monkeypatch)
    for _ in range(5):
        world.frame()
    pieces = world.turns.pieces(world.answer(20, 1.0))
    next(pieces)
    world.alone = 10.0
    assert len(list(pieces)) == 19 and len(world.seconds) < 130
