import threading
import time

import pytest

from vlmem_jax.train.goodput import KINDS, Goodput


@pytest.fixture
def clock(monkeypatch):
    """Time that moves when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Running:
    """What a step gives: ready when told to."""

    def __init__(self):
        self.ended = threading.Event()

    def block_until_ready(self):
        self.ended.wait()

    def end(self, goodput):
        self.ended.set()
        goodput._finished.result()


def test_each_moment_belongs_to_one_kind(clock):
    goodput = Goodput()
    clock[0] += 1
    with goodput.spent("step"):
        clock[0] += 2
        with goodput.spent("checkpoint"):
            clock[0] += 4
        clock[0] += 8
        assert goodput.seconds() == {**dict.fromkeys(KINDS, 0.0), "other": 1, "step": 10, "checkpoint": 4}
    clock[0] += 25
    assert goodput.summary() == (
        "goodput 25.0% of 40 s: step 25.0%, compile 0.0%, input wait 0.0%, checkpoint 10.0%, evaluation 0.0%, "
        "other 65.0%"
    )


def test_an_error_does_not_stop_the_clock(clock):
    goodput = Goodput()
    with pytest.raises(ValueError), goodput.spent("evaluation"):
        clock[0] += 3
        raise ValueError
    clock[0] += 1
    assert goodput.seconds()["evaluation"] == 3 and goodput.seconds()["other"] == 1


@pytest.mark.parametrize("ends_after, waited", [(0, 10), (4, 6), (10, 0), (15, 0)])
def test_data_that_come_while_a_step_runs_cost_nothing(clock, ends_after, waited):
    goodput, step = Goodput(), Running()
    goodput.started(step)
    with goodput.input_wait():
        for second in range(10):
            if second == ends_after:
                step.end(goodput)
            clock[0] += 1
    step.ended.set()
    goodput.close()
    assert goodput.seconds()["input_wait"] == waited and goodput.seconds()["step"] == 10 - waited


def test_before_the_first_step_nothing_hides_the_wait(clock):
    goodput = Goodput()
    with goodput.input_wait():
        clock[0] += 5
    assert goodput.seconds()["input_wait"] == 5
