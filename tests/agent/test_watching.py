"""What is watched, from a file to a memory."""

import io
import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.agent.scripted import Scripted
from tests.patches_world import save_video
from tests.stream.world import Frames, Said
from vlmem_jax.agent.building import BuildConfig
from vlmem_jax.agent.calls import run
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.segments import IngestConfig
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.watching import jpeg, keeper, watch
from vlmem_jax.stream import Shown, open_source

CONFIG = IngestConfig(threshold=200, longest=2.0)


class World:
    """A memory that is built of a source; `files` are what is kept."""

    def __init__(self, folder):
        self.files, self.said = FrameFiles(folder / "frames"), Said()
        self.builder = StreamBuilder(keeper(self.files.write, CONFIG), CONFIG, BuildConfig())

        self.model = Scripted(
            caption=lambda call: "seen",
            decide=lambda call: {"MERGE": 1.0},
            narrate=lambda call: "all of it",
            extract=lambda call: json.dumps({}),
        )

    def watch(self, source):
        """(segments, when it ended)."""
        end = run(watch(source, self.builder, self.said.notes), self.model)
        return self.builder.builder.pyramid.segments, end

    def file(self, path):
        return self.watch(open_source(str(path), self.said.reading))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


class Timed:
    """A source of still frames at these times."""

    name, live = "timed", False

    def __init__(self, *times):
        self.times = times

    def __iter__(self):
        for time in self.times:
            yield Shown(time, time + 0.5, lambda: Image.new("RGB", (8, 8)))


def times(segments):
    return [(one.start, one.end, [frame.time for frame in one.frames]) for one in segments]


def test_a_video_file_in_segments_of_frames_that_are_kept(world, tmp_path):
    """5 seconds that get brighter by 4 levels a frame, of 10 a second."""
    segments, end = world.file(save_video(tmp_path / "a.mp4", frames=50, fps=10, level=4))
    assert [(one.start, one.end) for one in segments] == [(0.0, 2.0), (2.0, 4.0), (4.0, end)]
    assert end == pytest.approx(5.0) and world.said == []
    assert {one.caption for one in segments} == {"seen"}
    for one in segments:
        assert one.start <= one.frames[0].time and one.frames[-1].time < one.end
        for frame in one.frames:
            level = np.asarray(world.files.image(frame.name)).mean()
            assert level == pytest.approx(40 * frame.time, abs=8)


def test_a_slide_that_stays_is_in_every_segment(world):
    segments, end = world.watch(Timed(0.0, 7.0))
    assert times(segments) == [(0.0, 2.0, [0.0]), (2.0, 4.0, [0.0]), (4.0, 6.0, [0.0]), (6.0, end, [0.0, 7.0])]
    assert {one.caption for one in segments} == {"seen"}


def test_times_that_do_not_rise_are_left_out_and_counted(world):
    segments, end = world.watch(Timed(0.0, 0.5, 0.5, 0.2, 1.0, 1.5))
    assert times(segments) == [(0.0, 2.0, [0.0, 0.5, 1.0, 1.5])] and end == 2.0
    assert world.said.notes.counts == {"time": 2}
    assert world.said[0].startswith("timed: a frame at 0.50 s comes no later than the one before")


def test_a_damaged_frame_is_named_by_its_time_and_the_others_stay(world):
    picture = Image.new("RGB", (8, 8))
    segments, end = world.watch(Frames([picture, picture, None, picture, None]))
    assert end == 0.5 and times(segments) == [(0.0, 0.5, [0.0, 0.1, 0.3])], "what is shown at 0.0, 0.2 and 0.4 s"
    assert world.said == [f"frames: the frame at 0.{n}0 s is left out: it is damaged" for n in (2, 4)]


def test_a_source_without_any_frame_is_refused(world):
    for source, name in ((Frames([None, None]), "frames"), (Timed(), "timed")):
        with pytest.raises(ValueError, match=f"{name} holds no frame that can be decoded"):
            world.watch(source)


def test_what_was_decoded_of_a_file_that_is_cut_short_is_kept(world, tmp_path):
    whole = save_video(tmp_path / "a.mkv", frames=50, fps=10, level=4, size=(64, 48)).read_bytes()
    (tmp_path / "half.mkv").write_bytes(whole[: len(whole) // 2])
    segments, end = world.file(tmp_path / "half.mkv")
    assert segments[0].start == 0 and 1 < segments[-1].end == end < 4
    assert "half.mkv ended at" in world.said[-1] and "its header says that it lasts for 5.00 s" in world.said[-1]


def test_a_size_that_changes_in_midst_of_a_file(world, tmp_path):
    """Two recordings of a transport stream, one behind the other."""
    av = pytest.importorskip("av")
    parts = []
    for size in ((64, 48), (128, 96)):
        with av.open(str(tmp_path / "part.ts"), "w") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
            for _ in range(20):
                container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", size, (90, 120, 150)))))
            container.mux(stream.encode())
        parts.append((tmp_path / "part.ts").read_bytes())
    (tmp_path / "a.ts").write_bytes(b"".join(parts))
    [segment], end = world.file(tmp_path / "a.ts")
    assert {world.files.image(frame.name).size for frame in segment.frames} == {(64, 48), (128, 96)}
    assert segment.end == end == pytest.approx(1.6, abs=0.15)


def test_a_file_of_uneven_rate_has_the_times_of_its_frames(world, tmp_path):
    av = pytest.importorskip("av")
    told = [0.0, 0.04, 0.08, 1.0, 1.04, 2.6]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        (stream.width, stream.height), stream.pix_fmt = (32, 32), "yuv420p"
        for time in told:
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32)))
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    segments, end = world.file(tmp_path / "a.mkv")
    assert [(one.start, one.end) for one in segments] == [(0.0, 2.0), (2.0, end)] and end > 2.6
    assert [frame.time for one in segments for frame in one.frames if frame.time > 1.5] == [pytest.approx(2.6)]


def test_a_video_of_one_frame_is_a_memory(world, tmp_path):
    [segment], end = world.file(save_video(tmp_path / "a.mp4", frames=1))
    assert (segment.start, segment.end, len(segment.frames)) == (0.0, end, 1)
    [episode] = run(world.builder.snapshot(), world.model).episodes
    assert episode.segments == (0,) and episode.frames == segment.frames


def test_frames_of_all_layers_are_one_file_each(world):
    """Equal ones are one, too."""
    segments, _ = world.watch(Timed(*np.arange(0, 6, 0.5).tolist()))
    assert len(segments) == 3 and len([frame for one in segments for frame in one.frames]) == 12
    assert len(list(world.files.files())) == 1


@pytest.mark.parametrize(("side", "size"), [(0, (40, 30)), (50, (40, 30)), (20, (20, 15))])
def test_large_frames_are_kept_smaller(side, size):
    with Image.open(io.BytesIO(jpeg(np.zeros((30, 40, 3), np.uint8), IngestConfig(side=side)))) as kept:
        assert kept.size == size and kept.format == "JPEG"
