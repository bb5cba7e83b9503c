"""Samples of models that see patches: placeholders, positions, videos, errors."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from tests.patches_world import save_tokenizer, save_video
from vlmem_jax.positions import PatchGrid
from vlmem_jax.processing import ImageConfig, PatchConfig, Tokenizer, Video, make_processor
from vlmem_jax.processing.patch_processor import place
from vlmem_jax.types import IGNORED, PatchGeometry, TileGeometry

GEOMETRY = PatchGeometry(size=4, frames=2, merge=2, window=2, tokens_per_second=2.0)
CONFIG = PatchConfig(min_pixels=64, max_pixels=1024, min_frame_pixels=64, max_frame_pixels=512)
SIZES = [(16, 16), (40, 24), (24, 64), (7, 5), (300, 200)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    tokenizer = Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return make_processor(tokenizer, CONFIG, GEOMETRY, template="qwen2-vl")


def talk(question, answer="Yes."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def picture(width, height, level=100):
    return Image.new("RGB", (width, height), (level,) * 3)


def clip(frames=5, size=(24, 16)):
    return Video([picture(*size, 10 * n) for n in range(frames)], seconds=0.35)


def text(processor, tokens_T):
    """With one placeholder for each run of them."""
    decoded = processor.tokenizer.decode(tokens_T, skip_special=False)
    for token in ("<|image_pad|>", "<|video_pad|>"):
        while token * 2 in decoded:
            decoded = decoded.replace(token * 2, token)
    return decoded


def test_the_chat_format(processor):
    sample = processor.encode(talk("<image>What? <video>"), [picture(16, 16)], [clip()])
    assert text(processor, sample.tokens_T) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What? "
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    targets = sample.labels_T[sample.labels_T != IGNORED]
    assert processor.tokenizer.decode(targets, skip_special=False) == "Yes.<|im_end|>"


def test_what_a_user_types_is_text(processor):
    typed = "a <image> <video> <|image_pad|><|vision_start|><|video_pad|> <|im_end|><|im_start|> <|endoftext|> b"
    sample = processor.prompt([typed, picture(16, 16), typed, clip()])
    plain = processor.prompt(["a", picture(16, 16), "a", clip()])
    for token in (*processor.template.control_tokens, "<|endoftext|>"):
        own = processor.tokenizer.id(token)
        assert (sample.tokens_T == own).sum() == (plain.tokens_T == own).sum(), token
    assert text(processor, sample.tokens_T).count(typed) == 2
    np.testing.assert_array_equal(sample.pixels_ISSc, plain.pixels_ISSc)


def test_an_unmarked_image_stands_right_before_the_question(processor):
    prompt = processor.prompt("What?", [picture(16, 16)])
    assert "user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n" in text(processor, prompt.tokens_T)
    assert text(processor, prompt.tokens_T).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_follow_up_goes_on_as_the_whole_prompt_does(processor):
    whole = processor.prompt("And now?", history=[([picture(16, 16), "What?"], "Yes.")])
    start, follow_up = processor.prompt("What?", [picture(16, 16)]), processor.follow_up("And now?").tokens_T
    answer = processor.tokenizer.encode("Yes.")
    assert whole.tokens_T.tolist() == [*start.tokens_T, *answer, *follow_up]


@pytest.mark.parametrize("size", SIZES)
def test_an_image_is_as_many_placeholders_as_blocks(processor, size):
    sample = processor.prompt("a", [picture(*size)])
    is_image = sample.tokens_T == processor.context_id
    assert is_image.sum() == len(sample.pixels_ISSc) == len(sample.layout_I4)
    assert sorted(sample.visual_index_T[is_image]) == list(range(is_image.sum()))
    assert (sample.visual_index_T[~is_image] == -1).all()


def test_visual_tokens_come_by_window_and_placeholders_by_row(processor):
    """Each block is found where its placeholder says, and its place in the layout is its own."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 40, 3), np.uint8)  # 3 x 5 blocks of 8 pixels
    sample = processor.prompt("a", [picture(16, 16), Image.fromarray(pixels)])
    slots = sample.visual_index_T[sample.tokens_T == processor.context_id][4:]
    for n, slot in enumerate(slots):
        row, col = divmod(n, 5)
        assert sample.layout_I4[slot, 2:].tolist() == [row, col]
        first = sample.pixels_ISSc[slot, 0, 0].reshape(3, 2, 4, 4)[:, 0]
        np.testing.assert_array_equal(first, pixels[8 * row : 8 * row + 4, 8 * col : 8 * col + 4].transpose(2, 0, 1))
    np.testing.assert_array_equal(
        sample.visual_positions_M[slots], sample.positions_T[sample.tokens_T == processor.context_id][4:]
    )
    windows = sample.layout_I4[slots].reshape(3, 5, 4)[..., 0]
    assert (
        len(set(windows[:2, :2].ravel())) == len(set(windows[2:, 4:].ravel())) == 1 and len(set(windows.ravel())) == 6
    )


def test_a_video_has_times(processor):
    """Five frames are three steps of 0.7 seconds: 1.4 positions, rounded down."""
    sample = processor.prompt("a", videos=[clip()])
    steps = sample.positions_T[sample.tokens_T == processor.video_id].reshape(3, -1, 3)
    np.testing.assert_array_equal(
        steps[:, :, 0] - steps[0, 0, 0], np.array([0, 1, 2])[:, None].repeat(steps.shape[1], 1)
    )
    last = np.flatnonzero(sample.tokens_T == processor.video_id)[-1]
    assert sample.positions_T[last + 1].tolist() == [steps.max() + 1] * 3


CONVERSATIONS = [
    (talk("a"), [], []),
    (talk("a <image>"), SIZES[:1], []),
    (talk("<image><image> b <image>"), SIZES[1:4], []),
    (talk("a"), SIZES[2:], []),
    (talk("<video> a"), [], [3]),
    (talk("<image>"), [], [4]),  # as LLaVA marks a video
    ([*talk("a"), *talk("<image> <video>")], SIZES[4:], [2]),
]


@pytest.mark.parametrize("conversation, sizes, frames", CONVERSATIONS)
@pytest.mark.parametrize("mask_text_only", [False, True])
def test_the_plan_is_what_encode_gives(processor, conversation, sizes, frames, mask_text_only):
    videos = [clip(count) for count in frames]
    options = {"mask_text_only": mask_text_only}
    sample = processor.encode(conversation, [picture(*size) for size in sizes], videos, **options)
    plan = processor.plan(conversation, sizes, [video.size for video in videos], **options)
    assert plan == (len(sample.tokens_T), len(sample.pixels_ISSc), int((sample.labels_T != IGNORED).sum()))
    assert len(sample.visual_positions_M) == len(sample.pixels_ISSc)
    assert len(sample.positions_T) == len(sample.visual_index_T) == plan.tokens
    blank = not sizes and not frames
    assert (sample.visual_index_T.max() == -1) == blank and plan.tiles >= (not (blank and mask_text_only))


def test_what_a_model_must_not_generate(processor):
    tokenizer = processor.tokenizer
    assert processor.stop_ids == (tokenizer.id("<|im_end|>"), tokenizer.id("<|endoftext|>"))
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    assert set(processor.control_ids) == {tokenizer.id(name) for name in names}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_placeholders_must_match_what_is_shown(processor):
    tokens = np.array([1, 7, 7, 7, 2], np.int32)
    with pytest.raises(ValueError, match=r"\[\(1, 2, 2\)\] give 4 features, but the text holds 3 placeholders"):
        place(tokens, [PatchGrid(1, 2, 2)], (7, 8), GEOMETRY)
    with pytest.raises(ValueError, match="next to each other, but text interrupts them"):
        place(np.array([7, 7, 1, 7, 7], np.int32), [PatchGrid(1, 2, 2)], (7, 8), GEOMETRY)


def test_where_placeholders_and_features_differ_the_sample_is_named(processor):
    wrong = copy.copy(processor)
    wrong._placeholders = lambda grid: grid.tokens - 1
    with pytest.raises(ValueError, match=r"give 4 features, but the text holds 3 placeholders \(sample a.jsonl:3\)"):
        wrong.encode(talk("<image>"), [picture(16, 16)], name="a.jsonl:3")


@pytest.mark.parametrize(
    "question, images, videos, message",
    [
        ("<image><image>", 1, 0, "holds 2 <image> but there are 1 images"),
        ("<video>", 0, 0, "holds 1 <video> but there are 0 videos"),
        ("<|image_pad|>", 0, 0, "must not hold the control token <|image_pad|>"),
        ("<|video_pad|>", 1, 0, "must not hold the control token <|video_pad|>"),
    ],
)
def test_errors_name_the_sample(processor, question, images, videos, message):
    with pytest.raises(ValueError) as error:
        processor.encode(talk(question), [picture(8, 8)] * images, [clip()] * videos, name="a.jsonl:3")
    assert message in str(error.value) and str(error.value).endswith("(sample a.jsonl:3)")


def test_images_too_long_name_the_sample(processor):
    with pytest.raises(ValueError, match=r"200 times as long as wide, got 900x4 pixels \(sample a:1\)"):
        processor.plan(talk("a"), [(900, 4)], name="a:1")


def test_videos_that_cannot_be_used_are_named(processor, tmp_path):
    pytest.importorskip("av")
    short = save_video(tmp_path / "short.mp4", frames=1)
    with pytest.raises(ValueError, match=r"must have at least 2 frames.*; got 1 \(.*short\.mp4\)"):
        processor.open_video(short)
    (tmp_path / "broken.mp4").write_bytes(short.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"broken\.mp4 (cannot be read|holds no video)"):
        processor.open_video(tmp_path / "broken.mp4")


def test_a_video_file(processor, tmp_path):
    pytest.importorskip("av")
    video, chosen = processor.open_video(save_video(tmp_path / "a.mp4", frames=30, fps=10))
    assert chosen == [0, 6, 12, 17, 23, 29] and video.seconds == pytest.approx(0.5)
    assert [frame.size for frame in video.frames] == [(24, 16)] * 6


def test_settings_that_do_not_go_together(processor):
    tokenizer = processor.tokenizer
    with pytest.raises(ValueError, match="images must be PatchConfig for this tower, got ImageConfig"):
        make_processor(tokenizer, ImageConfig(), GEOMETRY, template="qwen2-vl")
    with pytest.raises(ValueError, match="images must be ImageConfig for this tower, got PatchConfig"):
        make_processor(tokenizer, CONFIG, TileGeometry(28, 2))
    with pytest.raises(ValueError, match="rope_dhr is for images cut into tiles"):
        processor.prompt("a", rope_dhr=False)


def test_a_template_with_a_start_token_needs_one(processor, tmp_path):
    folder = save_tokenizer(tmp_path / "tokenizer")
    content = json.loads((folder / "tokenizer.json").read_text())
    last = max(token["id"] for token in content["added_tokens"])
    for n, token in enumerate(("<img>", "</img>", "<IMG_CONTEXT>"), 1):
        content["added_tokens"].append(dict(content["added_tokens"][0], id=last + n, content=token))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="begins with a start token, but the tokenizer in .* has none"):
        make_processor(Tokenizer.load(folder), ImageConfig(), TileGeometry(28, 2))


def test_blank_tiles_see_nothing_of_each_other(processor):
    sample = processor.encode(talk("a"))
    assert sample.pixels_ISSc.min() == 255 and sample.layout_I4.tolist() == [[1, 1, 0, 0]]
    assert sample.visual_positions_M.tolist() == [[0, 0, 0]]
