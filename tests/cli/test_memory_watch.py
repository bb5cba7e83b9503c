"""Videos that are watched as they come, and asked meanwhile."""

import io
import threading
import time

import pytest

from tests.agent import world
from tests.agent.world import short  # noqa: F401
from tests.stream.world import Frames, Said, photos
from vlmem_jax.agent.library import Library
from vlmem_jax.agent.store import open_store
from vlmem_jax.cli.main import main
from vlmem_jax.cli.memory_watch import _Ahead, _Stopped

pytestmark = pytest.mark.usefixtures("one_device", "short")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return world.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def watch(action, store, checkpoint, video):
    flags = ["--store", str(store), "--checkpoint", str(checkpoint), "--video", str(video)]
    return main(["memory", action, *flags, *world.FLAGS])


def test_a_video_is_asked_while_it_is_watched(tmp_path, checkpoint, monkeypatch, capsys):
    """The memory is that of a build: questions leave nothing in it."""
    video = world.video(tmp_path / "a.mp4")
    lines = ['{"at": 4.0, "question": "Early?"}', "", "{wrong", '{"question": "Late?"}']
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert watch("watch", tmp_path / "watched", checkpoint, video) == 0
    shown = capsys.readouterr()
    asked = [line for line in shown.out.splitlines() if line.startswith("[")]
    assert asked == ["[00:00:04] Early?", "[00:00:07.8] Late?"] and shown.out.count("(stage ") == 2
    assert 'a line of the standard input must be {"at": 120' in shown.err
    assert watch("build", tmp_path / "built", checkpoint, video) == 0
    name = Library(tmp_path / "built").named()
    with open_store(tmp_path / "built" / name) as built, open_store(tmp_path / "watched" / name) as watched:
        assert watched.pyramid() == built.pyramid() and watched.state == "closed"
        assert {kind: one.calls for kind, one in watched.cost().items()} == {
            kind: one.calls for kind, one in built.cost().items()
        }
    assert watch("watch", tmp_path / "watched", checkpoint, video) == 2
    assert "is complete; ask it by `vlmem memory ask`" in capsys.readouterr().err


def ahead(pictures, said, each=lambda: None, **source):
    stopping = threading.Event()
    return _Ahead(Frames(pictures, **source), said.notes, each, stopping), stopping


def test_frames_come_in_order_and_nothing_of_a_file_is_lost():
    said = Said()
    frames, _ = ahead(photos(200), said)
    assert [round(shown.time, 1) for shown in frames] == [n / 10 for n in range(200)] and said == []


def test_pictures_are_there_when_the_file_is_closed_and_damaged_ones_say_so():
    source, open_now = Frames([photos(1)[0], None]), [True]

    def made(picture, once=Frames.made):
        assert open_now, "it is read when it is closed"
        return once(picture)

    source.made = made
    frames = list(_Ahead(source, Said().notes, lambda: None, threading.Event()))
    open_now.clear()
    assert frames[0].picture().size == (24, 16)
    with pytest.raises(ValueError, match="it is damaged"):
        frames[1].picture()


def test_of_a_live_stream_the_oldest_frames_give_way():
    said, last = Said(), time.monotonic() + 20

    def slowly():
        """Until all have come, of which there is room for 64, and for the end."""
        while said.notes.counts["dropped"] < 37 and time.monotonic() < last:
            time.sleep(0.01)

    frames, _ = ahead(photos(100), said, live=True, each=slowly)
    times = [shown.time for shown in frames]
    assert times == sorted(times) and times[-1] == 9.9 and len(times) == 64 - 1 and said.notes.counts["dropped"] == 37


def test_what_stops_a_file_and_what_ends_a_live_stream():
    for live in (False, True):
        frames, stopping = ahead(photos(10), Said(), live=live)
        taken = iter(frames)
        next(taken)
        stopping.set()
        with pytest.raises(StopIteration if live else _Stopped):
            next(taken)


def test_what_fails_in_the_thread_is_raised():
    def broken(n):
        if n == 2:
            raise ValueError("the cable is cut")

    frames, _ = ahead(photos(5), Said(), before=broken)
    with pytest.raises(ValueError, match="the cable is cut"):
        list(frames)
