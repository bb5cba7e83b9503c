import json

import numpy as np
import pytest
from PIL import Image

from tests import patches_world
from vlmem_jax.data import Prompts, SourceConfig
from vlmem_jax.processing import PatchConfig, Tokenizer, make_processor
from vlmem_jax.types import PatchGeometry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    patches_world.save_tokenizer(folder / "tokenizer")
    patches_world.save_video(folder / "a.mp4")
    for n in range(2):
        Image.fromarray(np.full((16, 16 + 16 * n, 3), 80 * n, np.uint8)).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    image = PatchConfig(min_pixels=64, max_pixels=4096)
    return make_processor(Tokenizer.load(folder / "tokenizer"), image, PatchGeometry(4, 2, 2, 2, 2.0), None, "qwen2-vl")


@pytest.fixture
def prompts(folder, processor):
    def read(*lines):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / "prompts.jsonl").write_text(text)
        return Prompts([SourceConfig(str(folder / "prompts.jsonl"))], processor)

    return read


def turn(role, content):
    return {"role": role, "content": content}


def text(processor, sample):
    return processor.tokenizer.decode(sample.tokens_T, skip_special=False)


def test_a_released_line(prompts):
    read = prompts("", {"prompt": "What?", "image": "0.png", "answer": "a cat", "extra": 3}, "", {"prompt": "Why?"})
    first, second = read[0, 0], read[0, 1]
    assert read.counts == [2] and read.name((0, 1)).endswith("prompts.jsonl:4")
    assert (first.id, first.images, first.answers, first.answer_type) == ("0", ("0.png",), ("a cat",), "text")
    assert first.meta == {"extra": 3} and not first.is_raw
    assert (second.id, second.images, second.answers) == ("1", (), ())


def test_null_is_as_good_as_left_out(prompts):
    read = prompts({"prompt": "Why?", "image": None, "answer": None, "videos": None}, {"prompt": "Why?"})
    assert (read[0, 0].images, read[0, 0].answers) == ((), ())
    one, other = read.sample((0, 0)), read.sample((0, 1))
    assert one.tokens_T.tolist() == other.tokens_T.tolist() and not len(one.pixels_ISSc)


def test_all_keys_of_a_line(prompts):
    line = {"id": 7, "prompt": "Which?", "images": ["0.png"], "image": "1.png", "system": "Be brief."}
    line |= {"videos": [{"path": "a.mp4", "fps": 2}], "source": "zoo", "split": "train", "prompt_is_raw": False}
    line |= {"answer": "B", "answers": ["B", "dogs"], "answer_type": "choice", "choices": ["cats", "dogs"]}
    prompt = prompts(line)[0, 0]
    assert (prompt.id, prompt.images, prompt.answers) == ("7", ("1.png", "0.png"), ("B", "dogs"))
    assert (prompt.answer_type, prompt.choices, prompt.system) == ("choice", ("cats", "dogs"), "Be brief.")
    assert (prompt.source, prompt.split, prompt.meta) == ("zoo", "train", {})
    assert (prompt.videos[0].path, prompt.videos[0].fps, prompt.videos[0].frames) == ("a.mp4", 2.0, None)


def test_a_question_with_choices_is_answered_by_choice(prompts):
    assert prompts({"prompt": "Which?", "choices": ["a", "b"]})[0, 0].answer_type == "choice"


def test_the_template_and_placeholders_are_put_in(prompts, processor):
    read = prompts({"prompt": "What?", "images": ["0.png", "1.png"], "system": "Be brief."}, {"prompt": "Why?"})
    sample = read.sample((0, 0))
    shown = [f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (4, 8)]
    assert text(processor, sample) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{''.join(shown)}What?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample.name.endswith("prompts.jsonl:1") and len(sample.pixels_ISSc) == 12
    assert "You are a helpful assistant." in text(processor, read.sample((0, 1)))


def test_a_raw_prompt_is_used_as_it_stands(prompts, processor):
    start, end = "<|vision_start|>", "<|vision_end|>"
    raw = f"See {start}<|image_pad|>{end} and {start}<|video_pad|>{end}: what?"
    line = {"prompt": raw, "image": "0.png", "videos": [{"path": "a.mp4", "frames": 4}], "prompt_is_raw": True}
    sample = prompts(line).sample((0, 0))
    assert text(processor, sample) == raw.replace("<|image_pad|>", "<|image_pad|>" * 4).replace(
        "<|video_pad|>", "<|video_pad|>" * (len(sample.pixels_ISSc) - 4)
    )
    assert (sample.visual_index_T >= 0).sum() == len(sample.pixels_ISSc) > 4
    with pytest.raises(
        ValueError, match=r"this one holds 1 <\|(image|video)_pad\|> for 0 \(sample .*prompts.jsonl:1\)"
    ):
        prompts({"prompt": raw, "prompt_is_raw": True}).sample((0, 0))
    typed = prompts({"prompt": raw, "image": "0.png"}).sample((0, 0))
    assert raw in text(processor, typed) and (typed.visual_index_T >= 0).sum() == len(typed.pixels_ISSc) == 4
    with pytest.raises(ValueError, match=r"jsonl:1: a `prompt` that `prompt_is_raw` must be a text"):
        prompts({"prompt": [raw], "prompt_is_raw": True})[0, 0]


def test_what_a_prompt_shows_stands_before_it_or_where_it_says(prompts, processor):
    typed = "is <image> in <video>?"
    clip = {"path": "a.mp4", "frames": 4}
    read = prompts(
        {"prompt": typed, "image": "0.png", "videos": [clip]},
        {"prompt": [{"image": "0.png"}, {"video": "a.mp4", "frames": 4}, typed]},
        {"prompt": [typed, {"image": "0.png"}, " and ", {"video": "a.mp4", "frames": 4}], "images": ["1.png"]},
    )
    before, parts, between = (read.sample((0, n)) for n in range(3))
    np.testing.assert_array_equal(before.tokens_T, parts.tokens_T)
    np.testing.assert_array_equal(before.pixels_ISSc, parts.pixels_ISSc)
    shown = text(processor, between).replace("<|image_pad|>" * 4, "I").replace("<|video_pad|>", "")
    start, end = "<|vision_start|>", "<|vision_end|>"
    assert f"user\n{start}II{end}{typed}{start}I{end} and {start}{end}<|im_end|>" in shown
    assert read[0, 1].text == read[0, 0].text == typed and read[0, 2].text == f"{typed} and "


def test_a_video_gives_as_many_frames_as_asked_for(prompts):
    def tiles(**asked):
        return len(prompts({"prompt": "?", "videos": [{"path": "a.mp4", **asked}]}).sample((0, 0)).pixels_ISSc)

    assert tiles(frames=8) == 2 * tiles(frames=4) == 4 * tiles(frames=2)
    assert tiles(fps=8) == 2 * tiles(fps=4)
    assert tiles(fps=8, end=0.5) < tiles(fps=8)
    with pytest.raises(ValueError, match=r"must have the 11 frames asked for, but it has 10 .*a.mp4.*prompts.jsonl:1"):
        tiles(frames=11)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "a line must be one JSON object"),
        ("3", "a line must be a JSON object, got int"),
        ({"question": "?"}, r"`prompt` must be given; this line has the keys question; `question` must be called so"),
        ({"prompt": 3}, "`prompt` must be a text or a list of texts, .*, got 3"),
        (
            {"prompt": ["a", {"image": 3}]},
            "`prompt` must be a text or a list .*, got {'image': 3} in the list",
        ),
        ({"prompt": ["a", {"video": "a.mp4", "fps": 0}]}, "a video must be a path, or {path"),
        ({"prompt": ["a", ["b"]]}, r"got \['b'\] in the list"),
        ({"prompt": "?", "image": 3}, "`image` must be a path or a list of paths"),
        ({"prompt": "?", "image_path": "a.png"}, "there is no key `image_path`; it must be called `image`"),
        ({"prompt": "?", "options": ["a"]}, "there is no key `options`; it must be called `choices`"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must alternate user and assistant, .*; got none"),
        ({"prompt": "?", "answers": [1]}, "`answers` must be a list of texts"),
        ({"prompt": "?", "answer_type": "essay"}, "`answer_type` must be one of choice, .*; got 'essay'"),
        ({"prompt": "?", "videos": [3]}, "a video must be a path, or {path"),
        ({"prompt": "?", "videos": [{"path": "a.mp4", "fps": 1, "frames": 2}]}, "with fps or frames, not both"),
        ({"prompt": "?", "video": {"path": "a.mp4", "start": 3, "end": 2}}, "seconds from 0 on"),
        ({"prompt": "?", "video": {"path": "a.mp4", "end": "0:10"}}, "seconds from 0 on"),
        ({"prompt": "?", "video": {"path": "a.mp4", "start": float("nan")}}, "seconds from 0 on"),
        ({"prompt": "?", "prompt_is_raw": "yes"}, "`prompt_is_raw` must be true or false"),
    ],
)
def test_what_is_no_prompt_names_its_line(prompts, line, message):
    with pytest.raises(ValueError, match=rf"prompts.jsonl:1: .*{message}"):
        prompts(line)[0, 0]


def test_what_cannot_be_shown_names_its_line(prompts):
    for shown in ({"image": "none.png"}, {"videos": [{"path": "none.mp4"}]}, {"image": "../../etc/passwd"}):
        with pytest.raises(ValueError, match=r"\(sample .*prompts.jsonl:1\)"):
            prompts({"prompt": "?", **shown}).sample((0, 0))


def test_prompts_are_no_packed_lines(processor):
    with pytest.raises(ValueError, match="read from JSONL files"):
        Prompts([SourceConfig("prompts.array_record")], processor)


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"}, "Which?"]}], "answer": "dog"},
        {"conversations": [turn("human", "<image>Which?"), turn("gpt", "dog")], "image": "0.png"},
        {"messages": [turn("user", "Which?"), turn("assistant", "dog")], "images": ["0.png"]},
        {"prompt": "Which?", "image": ["0.png"], "answer": "dog"},
        {"prompt": [{"image": "0.png"}, "Which?"], "answers": ["dog"]},
    ],
)  # fmt: skip
def test_one_question_in_many_forms(prompts, line):
    read = prompts(line, {"prompt": "Which?", "images": ["0.png"], "answer": "dog"})
    assert read[0, 0].answers == ("dog",)
    np.testing.assert_array_equal(read.sample((0, 0)).tokens_T, read.sample((0, 1)).tokens_T)
    np.testing.assert_array_equal(read.sample((0, 0)).pixels_ISSc, read.sample((0, 1)).pixels_ISSc)


def test_what_was_said_before_is_part_of_a_prompt(prompts, processor):
    turns = [("user", "Look."), ("assistant", "Yes?"), ("user", "Which?")]
    messages = [{"role": "system", "content": "Be brief."}, *({"role": r, "content": c} for r, c in turns)]
    read = prompts({"messages": messages, "images": ["1.png"]})
    shown = text(processor, read.sample((0, 0)))
    assert shown.index("Be brief.") < shown.index("<|vision_start|>") < shown.index("Look.") < shown.index("Which?")
    assert read[0, 0].answers == () and len(read.sample((0, 0)).pixels_ISSc)


def test_videos_by_either_key(prompts):
    read = prompts({"prompt": "What?", "video": "a.mp4"}, {"prompt": "What?", "videos": [{"path": "a.mp4"}]})
    np.testing.assert_array_equal(read.sample((0, 0)).tokens_T, read.sample((0, 1)).tokens_T)
