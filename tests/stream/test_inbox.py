"""The order of frames and questions, and who waits or gives way where there is no room."""

import threading
import time

import numpy as np
import pytest

from tests.stream.world import Said
from vlmem_jax.stream.inbox import ASKED, FRAMES, Ended, Frame, Inbox, Last
from vlmem_jax.stream.questions import END, Question


def frame(at):
    return Frame(at, at + 1, np.zeros((1, 1, 3), np.uint8), time.monotonic())


def taken(inbox, count):
    """The next things, by their time or text."""
    found = [inbox.next() for _ in range(count)]
    return [one.text if isinstance(one, Question) else getattr(one, "time", None) for one in found]


def test_a_question_comes_after_the_frames_up_to_its_time():
    inbox = Inbox(False, [Question("end", END), Question("two", 2.0), Question("one", 1.5)], Said().notes, False)
    for at in (0.0, 1.0, 2.0, 3.0):
        inbox.put(frame(at))
    inbox.end(4.0)
    assert taken(inbox, 8) == [0.0, 1.0, "one", 2.0, "two", 3.0, 4.0, "end"]
    assert isinstance(inbox.next(), Ended)


def test_a_question_is_due_when_the_stream_has_come_that_far_without_a_new_frame():
    inbox, found = Inbox(False, [Question("a", 1.5)], Said().notes, False), []
    inbox.put(frame(1.0))
    assert taken(inbox, 1) == [1.0]
    waiting = threading.Thread(target=lambda: found.extend(taken(inbox, 1)), daemon=True)
    waiting.start()
    inbox.reach(1.4)
    waiting.join(0.1)
    assert not found
    inbox.reach(1.6)
    waiting.join(10)
    assert found == ["a"]


def test_a_typed_question_goes_before_frames_and_keeps_the_stream_open():
    inbox = Inbox(False, [], Said().notes, True)
    inbox.put(frame(0.0))
    inbox.ask(Question("now"))
    inbox.end(1.0)
    assert taken(inbox, 3) == ["now", 0.0, 1.0]
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(inbox.next()), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert not ended
    inbox.hang_up()
    waiting.join(10)
    assert isinstance(ended[0], Ended)


@pytest.mark.parametrize("live", [True, False])
def test_a_live_source_gives_way_and_another_waits(live):
    said = Said()
    inbox = Inbox(live, [], said.notes, True)

    def fill():
        for n in range(FRAMES + 2):
            inbox.put(frame(float(n)))
        for n in range(ASKED + 1):
            inbox.ask(Question(f"{n}?"))

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    filling.join(10 if live else 0.2)
    assert filling.is_alive() is not live
    if live:
        assert inbox.waiting == (FRAMES, ASKED)
        assert said.notes.counts == {"dropped": 2, "unasked": 1}
        assert said[0] == "looking is too slow: the frame of 0.00 s is dropped"
        assert said[-1] == f"{ASKED} questions wait already; not asked: '{ASKED}?'"
        return
    assert inbox.waiting == (FRAMES, 0)
    order = taken(inbox, FRAMES + 2 + ASKED + 1)
    assert sorted(map(str, order)) == sorted(
        [*(f"{n}.0" for n in range(FRAMES + 2)), *(f"{n}?" for n in range(ASKED + 1))]
    )
    assert not said


def test_one_that_is_closed_gives_nothing_and_keeps_nobody():
    inbox = Inbox(False, [Question("a", 0.0)], Said().notes, True)
    for n in range(FRAMES):
        inbox.put(frame(float(n)))
    waiting = threading.Thread(target=inbox.put, args=(frame(9.0),), daemon=True)
    waiting.start()
    inbox.close()
    waiting.join(10)
    assert not waiting.is_alive() and isinstance(inbox.next(), Ended)


def test_the_last_mark_needs_no_room():
    inbox = Inbox(False, [], Said().notes, False)
    for n in range(FRAMES):
        inbox.put(frame(float(n)))
    inbox.end(7.0)
    assert taken(inbox, FRAMES) == [0.0, 1.0, 2.0, 3.0]
    assert inbox.next() == Last(7.0)
