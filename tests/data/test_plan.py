import dataclasses
import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmem_jax.data import DataConfig, Plan, SourceConfig
from vlmem_jax.data.plan import draws, fill_rows
from vlmem_jax.processing import TileProcessor
from vlmem_jax.types import TileGeometry

MAX_TOKENS, MAX_TILES = 64, 6
sizes = st.lists(st.tuples(st.integers(1, MAX_TOKENS), st.integers(0, MAX_TILES)), max_size=60)


def packed(sizes, open_packs=4):
    sized = (((0, i), tokens, tiles) for i, (tokens, tiles) in enumerate(sizes))
    return [[i for _, i in row] for row in fill_rows(sized, MAX_TOKENS, MAX_TILES, open_packs)]


@settings(deadline=None)
@given(sizes, st.integers(1, 8))
def test_every_sample_is_in_one_row_and_no_row_is_over_a_limit(sizes, open_packs):
    rows = packed(sizes, open_packs)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    for row in rows:
        assert row and np.all(np.sum([sizes[i] for i in row], axis=0) <= (MAX_TOKENS, MAX_TILES))


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 8))
def test_later_samples_never_change_rows_that_left(first, second, open_packs):
    short, long = packed(first, open_packs), packed(first + second, open_packs)
    left = len(short) - min(len(short), open_packs)  # what was open at the end may still grow
    assert short[:left] == long[:left]


def test_no_sample_waits_for_ever():
    sizes = [(33, 0)] + [(34, 0)] * 2000  # no two fit together, and the first is the emptiest
    rows = packed(sizes)
    assert rows.index([0]) < 100


def test_a_sample_goes_where_it_fills_most():
    assert packed([(40, 0), (60, 0), (4, 0), (24, 0)]) == [[0, 3], [1, 2]]  # first fit would put 2 beside 0


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_and_epochs_differ(counts, seed):
    stream = draws(counts, [1.0] * len(counts), seed)
    epochs = [list(itertools.islice(stream, sum(counts))) for _ in range(3)]
    everything = [(file, line) for file, count in enumerate(counts) for line in range(count)]
    assert all(sorted(epoch) == everything for epoch in epochs)
    if max(counts) > 10:
        assert epochs[0] != epochs[1] != epochs[2]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), min_size=1, max_size=5))
def test_files_are_drawn_in_proportion_to_length_and_weight_throughout(files):
    counts, weights = zip(*files, strict=True)
    drawn = np.zeros(len(counts))
    shares = np.multiply(counts, weights) / np.dot(counts, weights)
    for n, (file, _) in enumerate(itertools.islice(draws(counts, weights, 0), 400), 1):
        drawn[file] += 1
        assert np.all(np.abs(drawn - n * shares) < len(counts))


def mixed_lines(folder, count=300):
    """Text, one image and several, of many lengths."""
    rng = np.random.default_rng(0)
    wide, tall, small = (
        folder.image("wide.png", 16, 8),
        folder.image("tall.png", 8, 32),
        folder.image("small.png", 8, 8),
    )
    kinds = [{}, {"image": wide}, {"image": tall}, {"image": [small, wide]}, {"image": [small, small, small]}]
    return [
        folder.talk("x" * rng.integers(1, 30), "y" * rng.integers(1, 60), **kinds[rng.integers(len(kinds))])
        for _ in range(count)
    ]


def test_mixed_data_fills_rows(folder, processor):
    config = folder.config(*mixed_lines(folder), pack_tokens=1000, pack_tiles=36)
    plan = Plan.train(config, processor, seed=0)
    plan.extend(60)
    assert plan.fill["tokens"] >= 0.9
    assert "tokens fill 9" in plan.report() and "in 60 rows" in plan.report()
    rows = [plan.row(i) for i in range(60)]
    used = np.array([np.sum([plan.samples.size(key)[:2] for key in row], axis=0) for row in rows])
    assert np.all(used <= (1000, 36))
    np.testing.assert_allclose(list(plan.fill.values()), used.mean(0) / (1000, 36))


def test_report_says_when_tiles_are_the_limit(folder, processor):
    plan = Plan.train(folder.config(folder.talk(image=folder.image("a.png", 8, 8)), pack_tiles=1), processor, 0)
    plan.extend(3)
    assert "raise data.pack_tiles" in plan.report()


def test_a_longer_plan_begins_with_the_shorter_one(folder, processor):
    config = folder.config(*mixed_lines(folder, 50))
    short, long = Plan.train(config, processor, seed=1), Plan.train(config, processor, seed=1)
    for rows in (3, 7, 30):
        short.extend(rows)
    long.extend(80)
    assert [short.row(i) for i in range(30)] == [long.row(i) for i in range(30)]
    assert short.fingerprint(30) == long.fingerprint(30) != Plan.train(config, processor, 2).fingerprint(0)
    other = Plan.train(config, processor, seed=2)
    other.extend(30)
    assert other.fingerprint(30) != short.fingerprint(30)


def test_evaluation_is_one_pass(folder, processor):
    lines = mixed_lines(folder, 40)
    plan = Plan.eval(folder.config(eval=lines), processor)
    plan.extend()
    keys = [key for row in range(len(plan)) for key in plan.row(row)]
    assert sorted(keys) == [(0, i) for i in range(40)]
    with pytest.raises(IndexError, match="the plan ends after"):
        plan.row(len(plan))


def bad_lines(folder):
    folder.image("good.png")
    (folder.path / "empty.png").write_bytes(b"")
    (folder.path / "text.png").write_text("not an image")
    outside = folder.path.parent / "outside.png"
    os.replace(folder.path / folder.image("gone.png"), outside)
    (folder.path / "link.png").symlink_to(outside)
    talk = folder.talk
    return [
        ("{oops", "must be one JSON object", ""),
        ({"conversations": []}, "`conversations` is empty", ""),
        (talk("<image><image>", image="good.png"), "2 <image> but there are 1 images", ""),
        (talk("<image>", image=["good.png", "good.png"]), "1 <image> but there are 2 images", ""),
        (talk("<image>"), "1 <image> but there are 0 images", ""),
        (talk(answer="long" * 50), "may have 200 tokens", "data.max_sample_tokens"),
        (talk(image=["good.png"] * 9), "8 tiles but this sample has", "data.pack_tiles"),
        (talk(image="missing.png"), "missing.png does not exist", ""),
        (talk(image="empty.png"), "empty.png is empty", ""),
        (talk(image="text.png"), "text.png is not of a known image format", ""),
        (talk(image="../outside.png"), "below its root", "root"),
        (talk(image="link.png"), "below its root", "root"),
        (talk(image=str(outside)), "below its root", "root"),
        (talk(image=folder.image("big.png", 3000, 30)), "image.max_pixels", ""),
        (talk(video="missing.mp4"), "missing.mp4 does not exist", ""),
        (talk(answer=""), "an answer must not be empty", ""),
    ]


@pytest.fixture
def strict_processor(processor):
    """A processor that refuses images of more than 50,000 pixels."""
    image = dataclasses.replace(processor.image, max_pixels=50_000)
    return TileProcessor(processor.tokenizer, image, TileGeometry(8, 2), system="s")


def test_a_bad_sample_stops_the_plan_with_file_line_and_knob(folder, strict_processor):
    good = folder.talk()
    for line, reason, knob in bad_lines(folder):
        with pytest.raises(ValueError, match=r"train.jsonl:2\b") as error:
            Plan.train(folder.config(good, line), strict_processor, 0).extend(10)
        assert reason in str(error.value) and knob in str(error.value)
        assert str(error.value).endswith("data.on_bad_sample=skip leaves out what cannot be used")


def test_bad_samples_are_skipped_counted_and_reported(folder, strict_processor):
    bad = [line for line, _, _ in bad_lines(folder)]
    config = folder.config(folder.talk(), *bad, folder.talk(), on_bad_sample="skip")
    plan = Plan.train(config, strict_processor, 0)
    plan.extend(10)
    assert {key for row in range(10) for key in plan.row(row)} == {(0, 0), (0, len(bad) + 1)}
    assert sorted(plan.skipped) == sorted(f"{config.train[0].path}:{i + 2}" for i in range(len(bad)))
    assert f"{len(bad)} samples skipped: " in plan.report()


def test_data_without_any_usable_sample_is_an_error(folder, processor):
    config = folder.config("{oops", "{oops", eval=["{oops"], on_bad_sample="skip")
    with pytest.raises(ValueError, match="no sample of the data can be used; one of them: .*train.jsonl"):
        Plan.train(config, processor, 0).extend(1)
    with pytest.raises(ValueError, match="no sample of the data can be used; one of them: .*eval.jsonl"):
        Plan.eval(config, processor).extend()
    with pytest.raises(ValueError, match="set data.train"):
        Plan.train(DataConfig(), processor, 0)


def test_frames_of_a_video_are_tiles(folder, processor, video):
    config = folder.config(folder.talk(video=video), min_frames=3, max_frames=5, max_sample_tokens=300)
    plan = Plan.train(config, processor, seed=0)
    plan.extend(1)
    size = plan.samples.size((0, 0))
    assert 3 <= size.tiles <= 5
    sample = plan.samples.load((0, 0))
    assert len(sample.pixels_ISSc) == size.tiles and len(sample.tokens_T) == size.tokens
    brightness = sample.pixels_ISSc.mean((1, 2, 3))
    assert np.all(np.diff(brightness) > 0)  # frames in order


def test_config_keys_are_checked():
    with pytest.raises(ValueError, match="weight must be positive, got 0.0 for a.jsonl"):
        SourceConfig("a.jsonl", weight=0.0)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        DataConfig(rows=0)
    with pytest.raises(ValueError, match="min_frames <= max_frames must hold, got 9 and 4"):
        DataConfig(min_frames=9, max_frames=4)
