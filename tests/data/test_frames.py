"""Frames of videos in ArrayRecord files: the right ones, complete, and only once."""

import numpy as np
import pytest

from vlmem_jax.data import frames
from vlmem_jax.data.frames import Frames, extract


@pytest.fixture
def two(folder, video):
    """Paths of two videos of ten frames in a second."""
    (folder.path / "b.mp4").write_bytes((folder.path / video).read_bytes())
    return [str(folder.path / "a.mp4"), str(folder.path / "b.mp4")]


@pytest.mark.parametrize(
    "fps, numbers", [(10.0, range(10)), (5.0, range(0, 10, 2)), (1.0, [0]), (4.0, [0, 3, 5, 8]), (99.0, range(10))]
)
def test_frames_are_those_at_equal_times(folder, two, fps, numbers):
    out = folder.path / "f.array_record"
    assert extract(two[:1], out, fps) == (len(numbers), 0)
    read = [Frames(out)[i] for i in range(len(Frames(out)))]
    assert [head["frame"] for head, _ in read] == list(numbers)
    for head, picture in read:
        assert head["video"] == two[0] and head["seconds"] == pytest.approx(head["frame"] / 10)
        assert np.asarray(picture).mean() == pytest.approx(20 * head["frame"], abs=4)


def test_every_video_has_a_file_and_finished_ones_are_kept(folder, two, monkeypatch):
    out = folder.path / "f.array_record"
    assert extract(two, out, 5.0) == (10, 0)
    first, second = sorted(folder.path.glob("f-*"))
    second.unlink()  # as if stopped before it was done
    kept = first.stat()
    assert extract(two, out, 5.0) == (5, 5)
    assert first.stat().st_mtime_ns == kept.st_mtime_ns and len(Frames(out)) == 10
    monkeypatch.setattr(frames, "_write", None)
    assert extract(two, out, 5.0) == (0, 10)


def test_frames_made_otherwise_are_not_mixed(folder, two):
    out = folder.path / "f.array_record"
    extract(two, out, 5.0)
    with pytest.raises(
        ValueError, match="f-00000-of-00002.array_record holds frames of .*remove it or choose another --out"
    ):
        extract(two, out, 2.0)
    with pytest.raises(ValueError, match="holds frames of .*b.mp4|holds frames of .*a.mp4"):
        extract(two[::-1], out, 5.0)


def test_a_video_that_cannot_be_read_is_named_when_the_others_are_done(folder, two):
    out = folder.path / "f.array_record"
    content = (folder.path / "a.mp4").read_bytes()
    (folder.path / "b.mp4").write_bytes(content[:100])
    gone = str(folder.path / "gone.mp4")
    with pytest.raises(
        ValueError, match="2 of 3 videos cannot be read: video .*gone.mp4 does not exist; video .*b.mp4 cannot"
    ):
        extract([gone, two[1], two[0]], out, 5.0)
    assert [file.name for file in folder.path.glob("f-*")] == ["f-00002-of-00003.array_record"]
    (folder.path / "gone.mp4").write_bytes(content)
    (folder.path / "b.mp4").write_bytes(content)
    assert extract([gone, two[1], two[0]], out, 5.0) == (10, 5)


@pytest.mark.parametrize(
    "options, message", [(dict(fps=0.0), "--fps must be a positive"), (dict(quality=101), "--quality is that of JPEG")]
)
def test_options_are_checked(folder, two, options, message):
    with pytest.raises(ValueError, match=message):
        extract(two, folder.path / "f.array_record", **options)
    with pytest.raises(ValueError, match="must name each video once, but .*a.mp4"):
        extract([two[0], two[0]], folder.path / "f.array_record")


def test_stopped_it_leaves_whole_files_alone(folder, two):
    def interrupt(done):
        raise KeyboardInterrupt

    out = folder.path / "f.array_record"
    with pytest.raises(KeyboardInterrupt):
        extract(two, out, 5.0, threads=1, progress=interrupt)
    assert not list(folder.path.glob("*.tmp"))
    finished = len(list(folder.path.glob("f-*")))
    assert finished >= 1 and extract(two, out, 5.0) == (10 - 5 * finished, 5 * finished)
