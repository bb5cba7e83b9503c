"""Samples of models that are told when each step of a video is: layout, positions, context, budgets, errors."""

import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer, save_video
from tests.processing.test_patch_processor import CONVERSATIONS, clip, picture, talk, text
from vlmem_jax.config import ConfigError, build
from vlmem_jax.processing import PatchConfig, StepConfig, Tokenizer, Video, make_processor
from vlmem_jax.processing.steps import choose_frames, video_grid
from vlmem_jax.processing.video import Clip, VideoSize
from vlmem_jax.types import IGNORED, StepGeometry

GEOMETRY = StepGeometry(size=4, frames=2, merge=2, window=0, tokens_per_second=0.0)
CONFIG = StepConfig(min_pixels=64, max_pixels=1024, min_frame_pixels=64, max_frame_pixels=512)
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def made(tokenizer):
    """A processor whose config of images has these keys changed."""

    def make(whole=True, **changes):
        image = dataclasses.replace(CONFIG, **changes)
        return make_processor(tokenizer, image, GEOMETRY, template="qwen-vl-steps", whole=whole)

    return make


@pytest.fixture(scope="module")
def processor(made):
    return made()


# --- the chat format --------------------------------------------------------------------------------------------------


def test_there_is_a_system_turn_where_one_is_given(processor):
    sample = processor.encode(talk("<image>What?"), [picture(16, 16)])
    assert text(processor, sample.tokens_T) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    told = processor.encode([{"from": "system", "value": "Be brief."}, *talk("What?")])
    assert text(processor, told.tokens_T).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?")
    for one in (sample, told):
        targets = one.labels_T[one.labels_T != IGNORED]
        assert processor.tokenizer.decode(targets, skip_special=False) == "Yes.<|im_end|>"


def test_each_of_several_answers_is_a_target(processor):
    sample = processor.encode([*talk("a", "One."), *talk("b", "Two.")])
    targets = sample.labels_T[sample.labels_T != IGNORED]
    assert processor.tokenizer.decode(targets, skip_special=False) == "One.<|im_end|>Two.<|im_end|>"


@pytest.mark.parametrize(
    ("wrapper", "start", "end"), [("none", "", ""), ("outer", "<|vision_start|>", "<|vision_end|>")]
)
def test_a_video_is_its_steps_each_behind_its_time(made, wrapper, start, end):
    """Five frames 0.35 s apart are three steps, in whose last the fifth stands twice."""
    processor = made(video_wrapper=wrapper)
    sample = processor.prompt("a", videos=[clip()])
    written = text(processor, sample.tokens_T)
    steps = f"<0.2 seconds>{VIDEO}<0.9 seconds>{VIDEO}<1.4 seconds>{VIDEO}"
    assert f"user\n{start}{steps}{end}a<|im_end|>" in written
    assert written.count("<|vision_start|>") == 3 + (wrapper == "outer")


def test_times_are_those_of_the_frames_in_their_file(processor):
    video = Video([picture(24, 16)] * 4, times=(0.0, 2.5, 2.75, 3.0))
    assert f"<1.2 seconds>{VIDEO}<2.9 seconds>{VIDEO}" in text(
        processor, processor.prompt("a", videos=[video]).tokens_T
    )


def test_what_a_user_types_is_no_step(processor):
    typed = f"<0.2 seconds>{VIDEO}"
    sample, plain = (processor.prompt([said, clip()]) for said in (typed, "a"))
    for token in processor.template.control_tokens:
        own = processor.tokenizer.id(token)
        assert (sample.tokens_T == own).sum() == (plain.tokens_T == own).sum(), token


def test_a_follow_up_goes_on_as_the_whole_prompt_does(processor):
    whole = processor.prompt([clip(), "And now?"], history=[([clip(), "What?"], "Yes.")])
    start, follow_up = processor.prompt([clip(), "What?"]), processor.follow_up([clip(), "And now?"]).tokens_T
    assert whole.tokens_T.tolist() == [*start.tokens_T, *processor.tokenizer.encode("Yes."), *follow_up]


@pytest.mark.parametrize("wrapper", ["none", "outer"])
def test_a_prompt_that_is_written_out_gets_the_steps_of_its_videos(made, wrapper):
    processor = made(video_wrapper=wrapper)
    meant = processor.prompt(["b", clip(), picture(16, 16), clip(3)])
    written = f"<|im_start|>user\nb{VIDEO}<|vision_start|><|image_pad|><|vision_end|>{VIDEO}<|im_end|>\n"
    found = processor.raw_prompt(written + "<|im_start|>assistant\n", [picture(16, 16)], [clip(), clip(3)])
    for field in ("tokens_T", "positions_T", "visual_index_T", "pixels_ISSc", "layout_I4"):
        np.testing.assert_array_equal(getattr(found, field), getattr(meant, field))
    with pytest.raises(ValueError, match=r"must hold <\|vision_start\|>.* for each video, 2; got 1 \(sample a:1\)"):
        processor.raw_prompt(VIDEO, videos=[clip(), clip()], name="a:1")


# --- tokens, positions, pixels ----------------------------------------------------------------------------------------


def test_each_step_is_placed_as_an_image(processor):
    """All of it at one time; text goes on behind the longer side of its grid."""
    sample = processor.prompt("a", videos=[clip(4)])  # 24 x 16 pixels: 2 x 3 tokens a step
    steps = np.flatnonzero(sample.tokens_T == processor.video_id).reshape(2, 6)
    for step in steps:
        before, after = sample.positions_T[step[0] - 1], sample.positions_T[step[-1] + 1]
        at = before[0] + 1
        grid = np.stack([np.zeros((2, 3), int), *np.indices((2, 3))], axis=-1).reshape(-1, 3)
        np.testing.assert_array_equal(sample.positions_T[step], at + grid)
        assert after.tolist() == [at + 3] * 3
    np.testing.assert_array_equal(sample.visual_positions_M, sample.positions_T[steps.ravel()])
    assert sample.layout_I4[:, 0].tolist() == sample.layout_I4[:, 1].tolist() == [1] * 6 + [7] * 6


def test_steps_show_the_frames_of_their_time(processor):
    frames = [Image.new("RGB", (24, 16), (40 * n,) * 3) for n in range(5)]
    sample = processor.prompt("a", videos=[Video(frames)])
    shown = sample.pixels_ISSc.reshape(3, 6, 2, 2, 3, 2, 4, 4)
    for step, pair in enumerate([(0, 1), (2, 3), (4, 4)]):
        for place, frame in enumerate(pair):
            assert (shown[step, :, :, :, :, place] == 40 * frame).all()


@pytest.mark.parametrize("conversation, sizes, frames", CONVERSATIONS)
@pytest.mark.parametrize("changes", [{}, {"context": "stride:2"}, {"context": "pooled:2", "video_wrapper": "outer"}])
@pytest.mark.parametrize("whole", [True, False])
def test_the_plan_is_what_encode_gives(made, conversation, sizes, frames, changes, whole):
    processor, videos = made(whole, **changes), [clip(count) for count in frames]
    sample = processor.encode(conversation, [picture(*size) for size in sizes], videos)
    plan = processor.plan(conversation, sizes, [video.size for video in videos])
    assert plan == (len(sample.tokens_T), len(sample.pixels_ISSc), int((sample.labels_T != IGNORED).sum()))
    assert len(sample.visual_positions_M) == len(sample.pixels_ISSc) == len(sample.layout_I4)


def test_steps_that_do_not_stand_in_the_sequence(made):
    """A memory sees them, at the places of the step before that does; without one, nobody does."""
    video, all_of_it = clip(10), made().prompt("a", videos=[clip(10)])
    whole, part = (made(whole, context="stride:2").prompt("a", videos=[video]) for whole in (True, False))
    assert whole.tokens_T.tolist() == part.tokens_T.tolist()
    assert text(made(), whole.tokens_T).count("seconds>") == 3
    assert f"<0.2 seconds>{VIDEO}<1.6 seconds>{VIDEO}<3.0 seconds>{VIDEO}" in text(made(), whole.tokens_T)
    np.testing.assert_array_equal(whole.pixels_ISSc, all_of_it.pixels_ISSc)
    steps = all_of_it.pixels_ISSc.reshape(5, 6, *all_of_it.pixels_ISSc.shape[1:])
    np.testing.assert_array_equal(part.pixels_ISSc, steps[::2].reshape(part.pixels_ISSc.shape))
    shown = whole.visual_index_T[whole.visual_index_T >= 0].reshape(3, 6)
    assert shown[:, 0].tolist() == [0, 12, 24]
    places = whole.visual_positions_M.reshape(5, 6, 3)
    np.testing.assert_array_equal(places[1::2], places[:-1:2])
    np.testing.assert_array_equal(places[::2].reshape(-1, 3), whole.positions_T[whole.visual_index_T >= 0])


# --- frames and sizes -------------------------------------------------------------------------------------------------


def test_budgets_differ_for_long_videos():
    geometry, size = StepGeometry(16, 2, 2, 0, 0.0), VideoSize(768, 1280, 720)
    tokens = {budget: video_grid(size, StepConfig(budget=budget), geometry).tokens for budget in ("frame", "video")}
    assert tokens["frame"] > 8 * tokens["video"]
    small = VideoSize(4, 1280, 720)
    found = [video_grid(small, StepConfig(budget=budget), geometry).tokens for budget in ("video", "capped")]
    assert found[0] > found[1], "where frames are few, one alone would take the whole budget"


@pytest.mark.parametrize(
    ("budget", "clip", "count", "chosen"),
    [
        ("frame", Clip(11, 4.0, 64, 48), None, [0, 3, 7, 10]),
        ("video", Clip(11, 4.0, 64, 48), None, [0, 2, 5, 8, 10]),
        ("frame", Clip(9, 4.0, 64, 48), 3, [0, 3, 5, 8]),
        ("video", Clip(9, 4.0, 64, 48), 3, [0, 4, 8]),
        ("frame", Clip(9, 4.0, 64, 48), 1, [0, 8]),
    ],
)
def test_an_odd_number_of_frames(budget, clip, count, chosen):
    assert choose_frames(clip, StepConfig(budget=budget), GEOMETRY, count) == chosen


def test_frames_of_a_part_of_a_video():
    found = choose_frames(Clip(100, 10.0, 64, 48), StepConfig(), GEOMETRY, within=(2.05, 4.0))
    assert (found[0], found[-1], len(found)) == (21, 40, 4)
    with pytest.raises(ValueError, match="at least 2 frames, of which a patch is made; got 0"):
        choose_frames(Clip(100, 10.0, 64, 48), StepConfig(), GEOMETRY, within=(12.0, 14.0))


def test_a_video_file_and_what_is_told_of_it(made, tmp_path, caplog):
    pytest.importorskip("av")
    path = save_video(tmp_path / "a.mp4", frames=30, fps=10)
    with caplog.at_level(logging.INFO, "vlmem_jax"):
        video, chosen = made(budget="video").open_video(path)
    assert chosen == [0, 6, 12, 17, 23, 29] and video.times == (0.0, 0.6, 1.2, 1.7, 2.3, 2.9)
    told = "frames 0, 6, 12, 17, 23, 29, 0.500 s apart, resized to 32x24: 36 visual tokens (image.budget=video, "
    assert f"{path}: {told}image.video_wrapper=none)" in caplog.text
    assert made().open_video(path, frames=4)[1] == [0, 10, 19, 29] and len(made().open_video(path, fps=4.0)[1]) == 12
    video, chosen = made().open_video(path, frames=2, start=1.0, end=2.0)
    assert chosen == [10, 20] and video.times == (1.0, 2.0) and video.seconds == pytest.approx(0.55)
    assert len(made().open_video(path, fps=4.0, end=1.0)[1]) == 4
    with pytest.raises(ValueError, match=r"a part of a video must lie in its 3\.00 s, got 5\.0 s to .*a\.mp4"):
        made().open_video(path, start=5.0)


def test_bad_settings_name_their_key(tokenizer):
    with pytest.raises(ValueError, match="1 <= min_video_pixels <= max_video_pixels must hold, got 9 and 8"):
        StepConfig(min_video_pixels=9, max_video_pixels=8)
    with pytest.raises(ConfigError, match="image.budget must be one of 'frame', 'video', 'capped'; got 'all'"):
        build(StepConfig, {"budget": "all"}, "image")
    with pytest.raises(ValueError, match="images must be StepConfig for this tower, got PatchConfig"):
        make_processor(tokenizer, PatchConfig(), GEOMETRY, template="qwen-vl-steps")
