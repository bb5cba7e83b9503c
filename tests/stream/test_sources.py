"""Files and folders as streams: every frame once, in time, and none of them ends a stream."""

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_video
from tests.stream import world
from vlmem_jax.processing.video import probe, read_frames
from vlmem_jax.stream import open_source
from vlmem_jax.stream.frames import Pace

av = pytest.importorskip("av")


def shown(name, said, fps=None):
    """[(time, ends, picture)] of a source; with `fps`, without the pictures of frames that are not looked at."""
    found, pace = [], Pace(fps or 1e9)
    for one in open_source(str(name), said.reading):
        try:
            found.append((one.time, one.ends, one.picture() if pace.takes(one.time) else None))
        except ValueError as error:
            said.append(str(error))
    return found


def write(path, pictures, rate=10, times=None, codec="mpeg4", options=None, stored="yuv420p", rotate=None):
    """A video of these pictures, of times in milliseconds if given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        (stream.width, stream.height), stream.pix_fmt = pictures[0].size, stored
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_image(picture)
            if times is not None:
                frame.pts, frame.time_base = times[n], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys(count, size=(32, 24), mode="RGB"):
    return [Image.new("L", size, 20 * n + 20).convert(mode) for n in range(count)]


# --- which frames -----------------------------------------------------------------------------------------------------


def test_a_file_gives_the_pictures_of_offline_mode_and_their_times(tmp_path):
    file = save_video(tmp_path / "a.mp4", frames=7, fps=10)
    said = world.Said()
    found = shown(file, said)
    clip = probe(file)
    assert tuple(time for time, _, _ in found) == clip.times(range(7))
    assert found[-1][1] == pytest.approx(clip.frames / clip.fps) and said == []
    for (_, _, picture), wanted in zip(found, read_frames(file, range(7)), strict=True):
        np.testing.assert_array_equal(picture, wanted)


@pytest.mark.parametrize(("fps", "times"), [(2.5, [0.0, 0.4, 0.8]), (1, [0.0, 1.0]), (4, [0.0, 0.3, 0.5, 0.8, 1.0])])
def test_frames_are_chosen_by_time(tmp_path, fps, times):
    file = save_video(tmp_path / "a.mp4", frames=11, fps=10)
    looked = [time for time, _, picture in shown(file, world.Said(fps=fps), fps) if picture is not None]
    assert looked == pytest.approx(times)


def test_a_pace_goes_on_where_it_was():
    whole = [time for time in np.arange(100) / 30 if whole_pace.takes(time)] if (whole_pace := Pace(4)) else []
    for stop in range(1, len(whole)):
        first, second = Pace(4), Pace(4, whole[stop - 1])
        parts = [time for time in np.arange(100) / 30 if time <= whole[stop - 1] and first.takes(time)]
        assert parts + [time for time in np.arange(100) / 30 if second.takes(time)] == whole


def test_more_frames_than_there_are_is_said(tmp_path):
    file = save_video(tmp_path / "a.mp4", frames=4, fps=10)
    said = world.Said(fps=30)
    assert sum(picture is not None for *_, picture in shown(file, said, 30)) == 4
    assert said == [f"{file} has 10 frames a second, fewer than --fps 30: all are looked at"]


def test_a_video_of_one_frame_is_a_stream(tmp_path):
    [(time, ends, picture)] = shown(save_video(tmp_path / "a.mp4", frames=1, fps=10), world.Said())
    assert (time, ends, picture.size) == (0.0, pytest.approx(0.1), (24, 16))


def test_a_variable_rate_is_followed(tmp_path):
    times = [0, 40, 80, 1000, 1040, 3000]
    file = write(tmp_path / "a.mkv", greys(6), 25, times, "libx264")
    said = world.Said(fps=1)
    found = shown(file, said, 1)
    assert [time for time, _, _ in found] == pytest.approx([time / 1000 for time in times])
    assert [time for time, _, picture in found if picture is not None] == pytest.approx([0.0, 1.0, 3.0]) and said == []


def test_a_stream_without_times_has_those_of_its_rate(tmp_path):
    file = write(tmp_path / "a.h264", greys(5), 25, codec="libx264")
    assert [time for time, _, _ in shown(file, world.Said(fps=25))] == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16])


def test_time_that_goes_back_goes_on(tmp_path):
    """Two recordings in one file, as some cameras write them."""
    for name in "ab":
        write(tmp_path / f"{name}.ts", greys(4), 10, codec="mpeg2video")
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    said = world.Said()
    times = [time for time, _, _ in shown(tmp_path / "c.ts", said)]
    assert len(times) >= 7 and all(np.diff(times) > 0) and max(np.diff(times)) < 0.5
    assert any("time went back by" in line for line in said)


def test_a_file_goes_by_the_rotation_of_its_track(tmp_path):
    file = write(tmp_path / "a.mp4", greys(2))
    content = file.read_bytes()
    straight = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    at = content.rindex(straight)
    file.write_bytes(content[:at] + turned + content[at + len(straight) :])
    assert {picture.size for *_, picture in shown(file, world.Said())} == {(24, 32)}


@pytest.mark.parametrize(("codec", "stored", "suffix"), [("ffv1", "gray", "mkv"), ("png", "rgba", "mov")])
def test_grey_frames_and_those_with_alpha_are_pictures(tmp_path, codec, stored, suffix):
    file = write(tmp_path / f"a.{suffix}", greys(3), codec=codec, stored=stored)
    pictures = [picture for *_, picture in shown(file, world.Said())]
    assert [picture.mode for picture in pictures] == ["RGB"] * 3
    np.testing.assert_allclose([np.asarray(picture).mean() for picture in pictures], [20, 40, 60], atol=3)


# --- what is damaged --------------------------------------------------------------------------------------------------


def test_a_frame_that_cannot_be_decoded_is_left_out(tmp_path):
    file = write(tmp_path / "a.avi", greys(6), codec="png", stored="rgb24")
    content = bytearray(file.read_bytes())
    second = content.index(b"\x89PNG", content.index(b"\x89PNG") + 1)
    content[second : second + 40] = bytes(40)
    file.write_bytes(content)
    said = world.Said()
    found = shown(file, said)
    assert 4 <= len(found) <= 5 and said.notes.counts == {"failed": 1}  # decoders of several threads lose its neighbour
    assert "a.avi: a frame cannot be decoded" in said[0] and said[0].endswith("it is left out")


def test_a_file_that_ends_before_its_header_says_is_said(tmp_path):
    file = write(tmp_path / "a.mkv", greys(12, (64, 48)), 1, codec="ffv1")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    said = world.Said()
    assert 0 < len(shown(file, said)) < 12
    assert "a.mkv ended at" in said[-1] and "lasts for 12.00 s" in said[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: it is empty"),
        (b"not a video" * 50, "cannot be read"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n", "a playlist"),
        (b"ffconcat version 1.0\nfile secret.mp4\n", "a list of other files"),
    ],
    ids=["empty", "words", "playlist", "list"],
)
def test_files_that_are_no_video_are_refused(tmp_path, content, message):
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.mp4 .*{message}"):
        open_source(str(tmp_path / "a.mp4"), world.Said().reading)


def test_a_file_without_a_picture_in_it_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"a\.mkv holds no video stream"):
        open_source(str(tmp_path / "a.mkv"), world.Said().reading)


def test_frames_of_too_many_pixels_are_refused(tmp_path):
    file = write(tmp_path / "a.mp4", greys(2))
    with pytest.raises(ValueError, match="32x24 pixels but image.max_pixels is 100"):
        open_source(str(file), world.Said(max_pixels=100).reading)


@pytest.mark.parametrize("name", ["nowhere.mp4", "/dev/video77"])
def test_what_is_not_there_is_named(name):
    what = "there is no camera" if name.startswith("/dev") else "there is no file, folder or device"
    with pytest.raises(ValueError, match=f"--video {name}: {what}"):
        open_source(name, world.Said().reading)


def test_a_pace_must_be_one():
    for fps in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="--fps must be above 0, got"):
            world.Said(fps=fps)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_pictures_of_a_folder_come_in_natural_order(tmp_path):
    world.pictures(tmp_path / "a", 12)
    said = world.Said(fps=2)
    source = open_source(str(tmp_path / "a"), said.reading)
    assert [file.stem for file in source.files] == [str(n) for n in range(12)] and said == []
    found = shown(tmp_path / "a", said, 2)
    assert [time for time, _, picture in found if picture is not None] == [n / 2 for n in range(12)]


def test_a_folder_of_all_kinds_gives_what_can_be_shown(tmp_path):
    """Mixed sizes and modes, a gap in the numbers, a damaged picture, and files that are none."""
    greys(1)[0].save(tmp_path / "f001.png")
    greys(1, (10, 10), "RGBA")[0].save(tmp_path / "f002.png")
    (tmp_path / "f003.png").write_bytes((tmp_path / "f002.png").read_bytes()[:30])
    greys(1, (200, 100), "L")[0].save(tmp_path / "f007.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden.png").write_text("x")
    (tmp_path / "inside").mkdir()
    said = world.Said()
    found = shown(tmp_path, said)
    assert [picture.size for *_, picture in found] == [(32, 24), (10, 10), (200, 100)]
    assert {picture.mode for *_, picture in found} == {"RGB"}
    assert said[0] == f"{tmp_path} holds 1 files that are no pictures; they are left out"
    assert [line for line in said if "numbers are missing" in line] == []  # f003.png and f007.jpg differ in more
    assert "f003.png" in said[-1]


def test_a_gap_in_numbers_is_said(tmp_path):
    for n in (1, 2, 5):
        greys(1)[0].save(tmp_path / f"{n}.png")
    said = world.Said()
    open_source(str(tmp_path), said.reading)
    assert said == [f"{tmp_path}: numbers are missing between 2.png and 5.png"]


@pytest.mark.parametrize("names", [[], ["a.txt"]])
def test_a_folder_without_pictures_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match="is a folder without pictures"):
        open_source(str(tmp_path), world.Said().reading)
