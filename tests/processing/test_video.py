"""Choosing and reading the frames of a video."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmem_jax.processing.video import choose_frames, probe, read_frames

LENGTH = 50


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """The same 50 frames in several containers; frame i is grey of level 5 i."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    kinds = [("a.mp4", "libx264"), ("b.mkv", "libx264"), ("c.avi", "mpeg4"), ("d.h264", "libx264")]
    for name, codec in kinds:
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25, options={"g": "12"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
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


@pytest.mark.parametrize("name", ["a.mp4", "b.mkv", "c.avi", "d.h264"])
def test_exactly_the_asked_frames_come(videos, name):
    assert probe(videos / name) == (LENGTH, 25.0, 64, 48)
    indices = [0, 1, 11, 12, 13, 30, 49, 7]
    frames = read_frames(videos / name, indices)
    assert all(frame.mode == "RGB" and frame.size == (64, 48) for frame in frames)
    levels = [np.asarray(frame).mean() / 5 for frame in frames]
    np.testing.assert_allclose(levels, indices, atol=0.9 if name == "c.avi" else 0.4)


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
