"""What is said of a stream, how often, and a log that a full disk ends."""

import errno

import pytest

from tests.stream.world import lines
from vlmem_jax.stream import Log, Notes
from vlmem_jax.stream.notes import Rates


def test_events_are_counted_and_the_first_of_a_kind_said_and_all_kept(tmp_path):
    said = []
    log = Log(tmp_path / "inside" / "log.jsonl", said.append)
    notes = Notes(said.append, log)
    for n in range(1, 112):
        notes.add("failed", f"frame {n}")
    notes.add("lost", "gone")
    log.close()
    assert notes.counts == {"failed": 111, "lost": 1}
    assert said == ["frame 1", "frame 2", "frame 3", "frame 10 (10 such by now)", "frame 100 (100 such by now)", "gone"]
    kept = lines(tmp_path / "inside" / "log.jsonl")
    assert len(kept) == 112 and kept[-1] == {"event": "lost", "text": "gone", "count": 1}


def test_a_log_that_cannot_grow_is_given_up_and_said_once(tmp_path):
    said = []
    log = Log(tmp_path / "log.jsonl", said.append)
    log.write(frame=0)
    kept, log._file = log._file, Full()
    log.write(frame=1)
    log.write(frame=2)
    log.close()
    kept.close()
    assert said == ["--log is given up: No space left on device; looking goes on"]
    assert lines(tmp_path / "log.jsonl") == [{"frame": 0}]


class Full:
    """A file on a disk without room."""

    def write(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_mean_is_one_of_as_many_steps_as_it_says():
    rates = Rates(3)
    for similarity, mean in ((1.0, None), (0.0, None), (0.5, 0.5), (0.7, 0.4)):
        rates.add(similarity)
        assert rates.similarity == (mean if mean is None else pytest.approx(mean))
