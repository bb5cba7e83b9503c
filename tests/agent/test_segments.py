"""A video in segments: all at once, and frame by frame."""

import numpy as np
import pytest

from vlmem_jax.agent.segments import IngestConfig, Segmenter, Span, frames_at_times, salient, split
from vlmem_jax.processing.scenes import SceneCuts

CONFIG = IngestConfig(threshold=10, quiet=5, longest=2.0, tail=0.25)


def offline(scores, times, end):
    """Segments of a whole video: its cuts first, then each scene in pieces."""
    cuts = SceneCuts(CONFIG.quiet, CONFIG.threshold)
    bounds = [times[0], *(times[cut] for cut in map(cuts.push_score, scores) if cut is not None), end]
    scenes = map(Span._make, zip(bounds, bounds[1:], strict=False))
    return [span for scene in scenes for span in split(scene, CONFIG.longest, CONFIG.tail)]


def videos(count):
    """Scores and times of videos: steady and strobing ones, of even and uneven frame rates."""
    rng = np.random.default_rng(1)
    for _ in range(count):
        frames, often = rng.integers(1, 150), rng.choice([0.01, 0.1, 0.4, 0.7])
        apart = rng.choice([0.04, 0.1]) * (1 if rng.random() < 0.5 else rng.uniform(0.1, 5, frames))
        times = (np.cumsum(np.broadcast_to(apart, frames)) - 0.02).tolist()
        yield np.where(rng.random(frames) < often, 20.0, 0.0), times, times[-1] + 0.04


def test_a_stream_gives_the_segments_of_the_whole():
    for scores, times, end in videos(1000):
        segmenter, found, heard = Segmenter(CONFIG), [], []
        for score, time in zip(scores, times, strict=True):
            new = segmenter.push_score(score, time)
            found += new
            heard += [time - span.end for span in new]
        found += segmenter.flush(end)
        assert found == offline(scores, times, end)
        assert all(one.end == other.start for one, other in zip(found, found[1:], strict=False))
        assert min(heard, default=0) >= -1e-9, "no segment is closed before it ends"
        assert segmenter.flush(end) == []


def test_an_open_segment_waits_for_a_cut_that_may_still_come():
    """A strobe from 1.0 s on: its cut is told at the last flash, once it is quiet."""
    scores = np.zeros(60)
    scores[[10, 12, 14, 16, 18, 21]] = 20
    segmenter = Segmenter(CONFIG)
    closed = [(n, span) for n, score in enumerate(scores) for span in segmenter.push_score(score, n / 10)]
    assert closed[:2] == [(10, Span(0.0, 1.0)), (26, Span(1.0, 2.1))]
    assert [span for _, span in closed[2:]] == [Span(2.1, 4.1)]


def test_a_short_tail_belongs_to_the_segment_before():
    assert split(Span(0.0, 4.2), 2.0, 0.25) == [Span(0.0, 2.0), Span(2.0, 4.2)]
    assert split(Span(0.0, 4.25), 2.0, 0.25) == [Span(0.0, 2.0), Span(2.0, 4.0), Span(4.0, 4.25)]
    assert split(Span(1.0, 1.1), 2.0, 0.25) == [Span(1.0, 1.1)]


def test_frames_by_their_times():
    rng, times = np.random.default_rng(2), np.arange(500) / 25
    for _ in range(200):
        start, fps = rng.uniform(0, 21), float(rng.choice([0.3, 1, 5, 30]))
        span = Span(start, start + rng.uniform(0, 6))
        found = frames_at_times(span, times, fps)
        inside = np.flatnonzero((times >= span.start) & (times < span.end))
        on_screen = int((times <= span.start).sum()) - 1
        assert set(found) <= {on_screen, *inside} and bool(len(found)) == (on_screen >= 0 or bool(len(inside)))
        if len(found):
            assert found[0] in (on_screen, *inside[:1]) and len(found) <= max(1, (span.end - span.start) * fps + 1)
    assert frames_at_times(Span(2.0, 3.0), times, 5.0).tolist() == [50, 55, 60, 65, 70]


def test_frames_are_chosen_before_the_end_is_known():
    rng = np.random.default_rng(3)
    for _ in range(200):
        times, start = np.cumsum(rng.uniform(0.01, 0.5, 60)), rng.uniform(0, 5)
        ends = np.sort(rng.uniform(start, 20, 2))
        early, late = (frames_at_times(Span(start, float(end)), times, 3.0) for end in ends)
        assert set(early[:-1]) <= set(late)


def test_frames_of_an_uneven_rate():
    times = [0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 9.0]
    assert frames_at_times(Span(0.0, 4.0), times, 1.0).tolist() == [0, 2, 3]


def test_what_is_on_the_screen_is_taken_where_nothing_new_begins():
    """A slide that stays for 10 seconds, also where something else comes before the end."""
    times = [0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 9.0]
    assert frames_at_times(Span(4.0, 9.0), times, 1.0).tolist() == [5]
    assert frames_at_times(Span(4.0, 9.5), times, 0.5).tolist() == [5], "at 4, 6 and 8 seconds"
    assert frames_at_times(Span(4.0, 9.5), times, 1.0).tolist() == [5, 6]
    assert frames_at_times(Span(2.9, 3.05), times, 1.0).tolist() == [3], "the new one comes before it is missed"
    assert frames_at_times(Span(50.0, 60.0), times, 5.0).tolist() == [6]
    assert frames_at_times(Span(-5.0, -1.0), times, 5.0).tolist() == []


def test_a_still_video_has_its_first_frame():
    assert salient(np.zeros(0)).tolist() == salient(np.zeros(5)).tolist() == [0]


@pytest.mark.parametrize("key", ["longest", "fps", "tail"])
def test_lengths_that_cannot_be(key):
    with pytest.raises(ValueError, match=f"{key} must be"):
        IngestConfig(**{key: -1.0})
