"""Videos as frames of one size: sampling, the line of times, placeholders, and what is learned."""

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.processing import FrameConfig, Tokenizer, make_processor
from vlmem_jax.processing.chat import FRAME
from vlmem_jax.processing.frames import spread, time_line
from vlmem_jax.processing.video import Clip, Video
from vlmem_jax.types import IGNORED, FrameGeometry

GEOMETRY = FrameGeometry(16, 6)
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    TokenizerFiles.of(folder, (FRAME,)).copy(folder / "with", {})
    return Tokenizer.load(folder / "with")


@pytest.fixture(scope="module")
def made(tokenizer):
    return lambda whole=True, **keys: make_processor(
        tokenizer, FrameConfig(**keys), GEOMETRY, None, "llava-video", whole
    )


def film(count, **more):
    frames = [Image.new("RGB", (30, 20), (10 * n, 0, 0)) for n in range(count)]
    return Video(frames, 0.5, tuple(0.5 * n for n in range(count)), 0.5 * count, **more)


@pytest.mark.parametrize(("frames", "wanted", "first"), [(100, 32, [0, 3, 6, 9, 12, 15]), (5, 32, [0, 1, 2, 3, 4])])
def test_frames_are_spread_as_released(frames, wanted, first):
    found = spread(frames, wanted)
    assert found[: len(first)] == first and found[-1] == frames - 1 and len(found) == min(frames, wanted)


def test_one_frame_a_second_where_they_are_few(made):
    clip = Clip(250, 25.0, 30, 20)
    assert made(sampling="second").choose_frames(clip) == list(range(0, 250, 25))
    assert made(sampling="second", frames=8).choose_frames(clip) == spread(250, 8)
    assert made(frames=4).choose_frames(clip) == [0, 83, 166, 249]


def test_the_line_of_times_is_that_of_the_release():
    assert time_line(2.0, (0.0, 0.5, 1.25)) == (
        "The video lasts for 2.00 seconds, and 3 frames are uniformly sampled from it. These frames are located at "
        "0.00s,0.50s,1.25s.Please answer the following questions related to this video."
    )


@pytest.mark.parametrize("line", [True, False])
def test_a_video_is_a_run_of_placeholders_and_perhaps_a_line(made, tokenizer, line):
    processor, video = made(time_line=line), film(3)
    sample = processor.encode(TALK, videos=[video])
    said = "" if not line else f"\n{time_line(1.5, video.times)}"
    text = f"<|im_start|>user\n{FRAME * 18}{said}\nWhat?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
    assert tokenizer.decode(sample.tokens_T, skip_special=False).replace("\\n", "\n").endswith(text)
    assert sample.pixels_ISSc.shape == (3, 16, 16, 3)
    assert [int(frame.max()) for frame in sample.pixels_ISSc] == [0, 10, 20]
    standing = np.flatnonzero(sample.visual_index_T >= 0)
    np.testing.assert_array_equal(sample.visual_index_T[standing], np.arange(18))
    np.testing.assert_array_equal(sample.positions_T, np.arange(len(sample.tokens_T)))
    np.testing.assert_array_equal(sample.visual_positions_M, standing)
    plan = processor.plan(TALK, video_sizes=[video.size])
    assert (plan.tokens, plan.tiles) == (len(sample.tokens_T), 3)
    assert plan.targets == (sample.labels_T != IGNORED).sum()
    asked = processor.prompt("What?", videos=[video])
    assert asked.tokens_T.tolist() == sample.tokens_T[: len(asked.tokens_T)].tolist()


def test_a_prompt_that_is_written_out_has_a_placeholder_for_each_video(made):
    processor, image = made(time_line=False), Image.new("RGB", (30, 20))
    sample = processor.raw_prompt(f"First {FRAME}, then {FRAME}.", videos=[film(2), film(3)])
    assert len(sample.pixels_ISSc) == 5 and (sample.visual_index_T >= 0).sum() == 30
    assert len(processor.raw_prompt(f"See {FRAME}", images=[image]).pixels_ISSc) == 1
    with pytest.raises(ValueError, match="a placeholder for each image or video, but this one holds 1"):
        processor.raw_prompt(f"See {FRAME}", videos=[film(2), film(3)])
    with pytest.raises(ValueError, match="shows images or videos, not both"):
        processor.raw_prompt(f"{FRAME} {FRAME}", images=[image], videos=[film(2)])


def test_an_image_is_one_frame(made):
    sample = made().encode(TALK, images=[Image.new("RGB", (64, 48))])
    assert len(sample.pixels_ISSc) == 1 and (sample.visual_index_T >= 0).sum() == 6


def test_answers_alone_or_what_the_release_learns(made, tokenizer):
    strict, released = (made(strict_mask=mask).encode(TALK, videos=[film(2)]) for mask in (True, False))
    np.testing.assert_array_equal(strict.tokens_T, released.tokens_T)
    learned = tokenizer.decode(strict.tokens_T[strict.labels_T != IGNORED], skip_special=False)
    assert learned == "A cat.<|im_end|>"
    everywhere = {tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>")} | {*tokenizer.encode("\n")}
    is_target = released.labels_T != IGNORED
    np.testing.assert_array_equal(is_target[np.isin(released.tokens_T, list(everywhere))], True)
    answer = tokenizer.encode("<|im_start|>assistant\nA cat.<|im_end|>\n")
    assert released.labels_T[-len(answer) :].tolist() == answer
    assert is_target.sum() == np.isin(released.tokens_T[: -len(answer)], list(everywhere)).sum() + len(answer)


@pytest.mark.parametrize("whole", [True, False])
def test_under_a_budget_every_nth_frame_stands_in_the_sequence(made, whole):
    processor, video = made(whole, context="stride:2"), film(5)
    sample = processor.encode(TALK, videos=[video])
    assert len(sample.pixels_ISSc) == (5 if whole else 3)
    standing = np.flatnonzero(sample.visual_index_T >= 0)
    assert len(standing) == 18
    frames = sample.visual_index_T[standing] // 6
    assert frames.tolist() == np.repeat([0, 2, 4] if whole else [0, 1, 2], 6).tolist()
    if whole:  # a frame that is not there has the positions of the one before
        by_frame = sample.visual_positions_M.reshape(5, 6)
        np.testing.assert_array_equal(by_frame[1::2], by_frame[:-1:2])
    plan = processor.plan(TALK, video_sizes=[video.size])
    assert (plan.tokens, plan.tiles) == (len(sample.tokens_T), len(sample.pixels_ISSc))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_frames_that_a_memory_keeps_stand_first(made, tokenizer, count):
    """The model puts them there; the times of a choice that it has yet to make are not told."""
    processor, every, video = made(context="kept:3"), made(), film(count)
    sample, whole = processor.encode(TALK, videos=[video]), every.encode(TALK, videos=[video])
    assert processor.tile.keeps == 3 and len(sample.pixels_ISSc) == count
    standing = sample.visual_index_T[sample.visual_index_T >= 0]
    np.testing.assert_array_equal(standing, np.arange(6 * min(count, 3)))
    if count <= 3:
        np.testing.assert_array_equal(sample.tokens_T, whole.tokens_T)
    else:
        assert "located at" not in tokenizer.decode(sample.tokens_T, skip_special=False)
    with pytest.raises(ValueError, match="kept:3 takes one video, or no more frames in all; got 2 of 7 frames"):
        processor.prompt("Which?", videos=[film(2), film(5)])


@pytest.mark.parametrize(
    ("keys", "words"), [(dict(frames=0), "frames"), (dict(context="pooled:2"), "all, stride:n or kept:n")]
)
def test_bad_keys_are_named(keys, words):
    with pytest.raises(ValueError, match=words):
        FrameConfig(**keys)


@pytest.mark.parametrize("line", [True, False])
def test_a_video_that_was_seen_before_has_its_prompt_without_tiles(made, line):
    processor, video = made(whole=False, time_line=line), film(3)
    shown, recalled = processor.prompt("What?", videos=[video]), processor.recalled("What?", video.size)
    for name in ("tokens_T", "positions_T", "visual_index_T"):
        np.testing.assert_array_equal(getattr(recalled, name), getattr(shown, name))
    assert len(recalled.pixels_ISSc) == len(recalled.visual_positions_M) == 0
    each = [processor.frame(frame) for frame in video.frames]
    np.testing.assert_array_equal(each, shown.pixels_ISSc)
