"""A memory of a video that runs, and what becomes of it whatever comes in one go."""

import json

import numpy as np
import pytest

from tests.agent.scripted import Scripted
from vlmem_jax.agent.building import BuildConfig, build
from vlmem_jax.agent.calls import run
from vlmem_jax.agent.manager import ACTIONS
from vlmem_jax.agent.nodes import Cue, Frame, Segment
from vlmem_jax.agent.segments import IngestConfig, Span, frames_at_times, split
from vlmem_jax.agent.stream import StreamBuilder
from vlmem_jax.agent.subtitles import Track
from vlmem_jax.processing.scenes import SceneCuts

INGEST = IngestConfig(threshold=20, quiet=4, longest=2.0, tail=0.3, fps=3.0)
BUILD = BuildConfig(fps=1.0, images=6)


def seen(call):
    """A number that depends on all that a call shows and says."""
    return sum(map(ord, call.key))


def model():
    """Decides and tells by what it sees."""
    return Scripted(
        caption=lambda call: json.dumps({"saw": seen(call)}),
        narrate=lambda call: f"story {seen(call)}",
        extract=lambda call: json.dumps({"scenes": [{"location": f"place {seen(call) % 3}"}]}),
        decide=lambda call: {label: 1.0 * (n == seen(call) % 3) for n, label in enumerate(ACTIONS)},
    )


def keep(frame, time):
    return Frame(f"{frame[0, 0].tolist()}", time)


def videos(count):
    """Frames of one colour each: still, cut, and strobing, at even and uneven rates."""
    rng = np.random.default_rng(4)
    for _ in range(count):
        frames, often = int(rng.integers(1, 140)), rng.choice([0.02, 0.15, 0.6])
        level = np.cumsum(np.where(rng.random(frames) < often, 90, 1)) % 256
        apart = 0.1 * (1 if rng.random() < 0.5 else rng.uniform(0.2, 4, frames))
        times = np.cumsum(np.broadcast_to(apart, frames)).tolist()
        yield np.broadcast_to(level[:, None, None, None], (frames, 2, 3, 3)).astype(np.uint8), times, times[-1] + 0.1


def talk(end, seed=0):
    """Cues all over a video, each of other words."""
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.uniform(0, end, 1 + int(end)))
    return Track([Cue(n, at, at + rng.uniform(0, 3), f"word {n}") for n, at in enumerate(starts.tolist())])


def whole(frames, times, end):
    """The memory of a video that is known to its end."""
    cuts = SceneCuts(INGEST.quiet, INGEST.threshold)
    bounds = [times[0], *(times[cut] for cut in map(cuts.push, frames) if cut is not None), end]
    scenes = map(Span._make, zip(bounds, bounds[1:], strict=False))
    spans = [span for scene in scenes for span in split(scene, INGEST.longest, INGEST.tail)]
    chosen = [[keep(frames[n], times[n]) for n in frames_at_times(span, times, INGEST.fps)] for span in spans]
    segments = [Segment(n, *span, frames=tuple(of)) for n, (span, of) in enumerate(zip(spans, chosen, strict=True))]
    return run(build(segments, BUILD, track=talk(end)), model())


def test_a_stream_gives_the_memory_of_the_whole_video():
    for frames, times, end in videos(60):
        stream, most = StreamBuilder(keep, INGEST, BUILD, talk(end)), 0
        for frame, time in zip(frames, times, strict=True):
            run(stream.push(frame, time), model())
            most = max(most, stream.held)
        run(stream.flush(end), model())
        assert run(stream.snapshot(), model()) == whole(frames, times, end)
        assert most <= 4 * INGEST.quiet + 4


def test_no_frame_is_kept_that_no_segment_shows():
    """Though frames are kept before their segments are closed."""
    for frames, times, end in videos(60):
        kept = []

        def noted(frame, time, kept=kept):
            kept.append(time)
            return keep(frame, time)

        stream = StreamBuilder(noted, INGEST, BUILD)
        for frame, time in zip(frames, times, strict=True):
            run(stream.push(frame, time), model())
        run(stream.flush(end), model())
        assert set(kept) == {frame.time for one in stream.builder.pyramid.segments for frame in one.frames}
        assert len(kept) == len(set(kept))


def test_no_call_of_three_hours_is_over_its_budget_whatever_becomes_of_them():
    """One episode of all is the worst; of the frames the last few are held as they came."""
    long = Scripted(
        caption=lambda call: "x" * 2048, narrate=lambda call: "y" * 2048, extract=lambda call: "z",
        decide=lambda call: {"MERGE": 1.0},
    )  # fmt: skip
    ingest, config = IngestConfig(fps=1.0), BuildConfig(images=20)
    seconds, frame = 3 * 3600, np.zeros((1, 1, 3), np.uint8)
    track = Track([Cue(n, float(n), n + 1.0, "w" * 500) for n in range(seconds)])
    stream, most = StreamBuilder(keep, ingest, config, track), 0
    for time in range(seconds):
        run(stream.push(frame, float(time)), long)
        most = max(most, stream.held)
    run(stream.flush(float(seconds)), long)
    [episode] = run(stream.snapshot(), long).episodes
    assert len(episode.segments) == 1080 and most <= 3
    calls = [call for asked in long.asked.values() for call in asked]
    assert max(len(call.frames) for call in calls if call.kind != "decide") == config.images
    assert max(len(call.frames) for call in long.asked["decide"]) == config.manage.images
    assert max(len(call.text) for call in calls) < 6000


def test_a_snapshot_knows_nothing_of_what_comes_later_and_changes_nothing():
    frames, times, end = next(video for video in videos(50) if len(video[1]) > 100)
    stream, asked = StreamBuilder(keep, INGEST, BUILD), StreamBuilder(keep, INGEST, BUILD)
    for n, (frame, time) in enumerate(zip(frames, times, strict=True)):
        for builder in (stream, asked):
            run(builder.push(frame, time), model())
        if n % 7 == 0:
            found = run(asked.snapshot(), model())
            assert all(one.end <= time for one in (*found.segments, *found.episodes))
            assert all(frame.time <= time for one in found.episodes for frame in one.frames)
    for builder in (stream, asked):
        run(builder.flush(end), model())
    assert run(stream.snapshot(), model()) == run(asked.snapshot(), model())
    assert asked.builder.pyramid.episodes == stream.builder.pyramid.episodes


def test_nothing_is_told_before_it_is_said():
    """Whatever will be said is the same to what is closed before, word for word."""
    frames, times, end = next(video for video in videos(50) if len(video[1]) > 100)
    track, asked = talk(end), model()
    stream = StreamBuilder(keep, INGEST, BUILD, track)
    for n, (frame, time) in enumerate(zip(frames, times, strict=True)):
        run(stream.push(frame, time), asked)
        if n % 30 == 29:
            told = Track([cue for cue in track.cues if cue.start <= time])
            other = StreamBuilder(keep, INGEST, BUILD, told)
            for one, at in zip(frames[: n + 1], times[: n + 1], strict=True):
                run(other.push(one, at), model())
            assert run(stream.snapshot(), asked) == run(other.snapshot(), model())
    assert any("> word" in call.text for call in asked.asked["caption"])


def test_times_that_do_not_rise_are_refused():
    stream = StreamBuilder(keep, INGEST, BUILD)
    frame = np.zeros((2, 3, 3), np.uint8)
    run(stream.push(frame, 1.0), model())
    with pytest.raises(ValueError, match="times of frames must rise, got 1.0 after 1.0"):
        run(stream.push(frame, 1.0), model())
    assert run(StreamBuilder(keep, INGEST, BUILD).flush(3.0), model()) == []
