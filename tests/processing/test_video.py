"""Choosing and reading the frames of a video."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmem_jax.processing.media import Encoded
from vlmem_jax.processing.video import Clip, choose_frames, probe, read_frames, sampled_frames

LENGTH = 50
KINDS = {
    "a.mp4": "libx264",
    "b.mkv": "libx264",
    "c.avi": "mpeg4",
    "d.h264": "libx264",
    "e.mov": "libx264",
    "f.webm": "libvpx",
    "g.ts": "libx264",
    "h.mpg": "mpeg2video",
    "i.flv": "libx264",
    "j.wmv": "wmv2",
    "k.gif": "gif",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The same 50 frames in several containers; frame i is grey of level 5 i."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    for name, codec in KINDS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options={"g": "12"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "gray" if codec == "gif" else "yuv420p"
            for index in range(LENGTH):
                frame = av.VideoFrame.from_image(Image.new("RGB", (64, 48), (5 * index,) * 3))
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


def test_middle_of_equal_intervals():
    assert choose_frames(100, 4, 4) == [12, 37, 62, 87]
    assert choose_frames(3, 4, 24) == [0, 1, 2]
    assert choose_frames(0, 4, 24) == []


@given(available=st.integers(1, 1000), minimum=st.integers(1, 8), more=st.integers(0, 24), seed=st.integers(0, 99))
def test_random_frames_are_ordered_and_one_to_an_interval(available, minimum, more, seed):
    frames = choose_frames(available, minimum, minimum + more, np.random.default_rng(seed))
    assert min(minimum, available) <= len(frames) <= minimum + more
    edges = np.linspace(0, available, len(frames) + 1).astype(int)
    assert all(low <= frame < high for frame, low, high in zip(frames, edges[:-1], edges[1:], strict=True))
    assert frames == choose_frames(available, minimum, minimum + more, np.random.default_rng(seed))


@pytest.mark.parametrize("name", KINDS)
def test_exactly_the_asked_frames_come(videos, name):
    assert probe(videos / name) == Clip(LENGTH, 25.0, 64, 48)
    indices = [0, 1, 11, 12, 13, 30, 49, 7]
    frames = read_frames(videos / name, indices)
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in frames)
    levels = [np.asarray(frame).mean() / 5 for frame in frames]
    np.testing.assert_allclose(levels, indices, atol=0.4 if KINDS[name] in ("libx264", "gif") else 0.9)


def test_a_part_of_a_video():
    """Frames on the screen at both ends are of it; nothing beyond."""
    even = Clip(50, 25.0, 64, 48)
    assert even.window() == (0, even) and even.window(0.5, 1.0) == (12, even._replace(frames=14))
    assert even.window(1.99)[0] == 49 and even.window(0.0, 9.0) == (0, even)
    uneven = Clip(4, 1.0, 64, 48, starts=[0.0, 0.1, 0.5, 0.75])  # at 0, 0.4, 2 and 3 of 4 seconds
    first, clip = uneven.window(0.5, 2.5)
    assert (first, clip.frames, clip.frames / clip.fps) == (1, 2, pytest.approx(2.6))
    assert clip.times([0, 1]) == pytest.approx((0.0, 1.6)) and uneven.window(0.5, 0.5)[1].frames == 1
    for start, end in ((2.0, None), (-1.0, 1.0), (1.0, 0.5), (float("nan"), None)):
        with pytest.raises(ValueError, match=r"a part of a video must lie in its 2\.00 s, got"):
            even.window(start, end)


def test_truncated_video(videos, tmp_path):
    whole = (videos / "b.mkv").read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.mkv ends at frame \d+, but frame 49 is asked for"):
        read_frames(tmp_path / "half.mkv", [0, 49])
    whole = (videos / "a.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.mp4 cannot be read"):
        probe(tmp_path / "half.mp4")


def test_bad_files(videos, tmp_path):
    with pytest.raises(ValueError, match=r"none\.mp4 does not exist"):
        probe(tmp_path / "none.mp4")
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match=r"empty\.mp4 cannot be read"):
        probe(tmp_path / "empty.mp4")
    with pytest.raises(ValueError, match=r"64x48 pixels but image\.max_pixels is 100"):
        read_frames(videos / "a.mp4", [0], max_pixels=100)
    with pytest.raises(ValueError, match=r"64x48 pixels but image\.max_pixels is 100"):
        next(sampled_frames(videos / "a.mp4", 1.0, max_pixels=100))
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be opened: it is a folder"):
        probe(tmp_path / "a.mp4")


LISTS = {
    "ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
    "M3U8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "SDP": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "DASH": '<?xml version="1.0"?>\n<MPD><Period><AdaptationSet><Representation><BaseURL>secret.mp4</BaseURL>'
    "</Representation></AdaptationSet></Period></MPD>\n",
}


@pytest.mark.parametrize("suffix", ["mp4", "m3u8", "ffconcat", "sdp", "mpd"])
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_other_files_is_refused_and_they_stay_closed(videos, tmp_path, kind, suffix):
    for name, source in (("secret.mp4", "a.mp4"), ("secret.ts", "g.ts")):
        (tmp_path / name).write_bytes((videos / source).read_bytes())
        os.utime(tmp_path / name, (0, 0))
    path = tmp_path / f"u.{suffix}"
    path.write_text(LISTS[kind])
    what = "XML" if kind == "DASH" else kind
    for file in (path, Encoded(path.name, path.read_bytes())):
        for read in (probe, lambda file: read_frames(file, [0])):
            with pytest.raises(
                ValueError, match=rf"u\.{suffix} cannot be read: it is .*{what}.*formats .* are MP4, MOV"
            ):
                read(file)
    assert all((tmp_path / name).stat().st_atime == 0 for name in ("secret.mp4", "secret.ts"))


def test_images_and_their_sequences_are_no_videos(tmp_path):
    for n in range(3):
        Image.new("RGB", (64, 48)).save(tmp_path / f"{n}.png")
    with pytest.raises(ValueError, match=r"0\.png cannot be read: it is PNG"):
        probe(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"%d\.png does not exist"):
        probe(tmp_path / "%d.png")


def test_only_files_are_opened(videos):
    for name in (
        f"concat:{videos / 'a.mp4'}",
        f"subfile,,start,0,end,0,,:{videos / 'a.mp4'}",
        "http://127.0.0.1:9/a.mp4",
    ):
        with pytest.raises(ValueError, match="does not exist"):
            probe(name)
    odd = videos / "a:b.mp4"
    odd.write_bytes((videos / "a.mp4").read_bytes())
    assert probe(odd) == probe(videos / "a.mp4")
