"""From conversations to the text of a prompt."""

import dataclasses

import pytest

from vlmem_jax.processing import chat
from vlmem_jax.processing.tile_processor import lines
from vlmem_jax.processing.video import VideoSize

TEMPLATE = chat.template("internlm2-chat")
IMAGE = (8, 8)


def turn(speaker, value):
    return {"from": speaker, "value": value}


def rendered(dialogue, system=None):
    return "".join(chat.render(dialogue, TEMPLATE, system))


def text(*values, images=0, frames=(), system="S"):
    """The prompt of a training conversation whose turns are `values`, without its system turn."""
    conversation = [turn(("human", "gpt")[index % 2], value) for index, value in enumerate(values)]
    dialogue = chat.read_conversation(conversation, [IMAGE] * images, [VideoSize(n, 8, 8) for n in frames])
    messages = ([piece for part in message for piece in lines(part)] for message in dialogue.messages)
    prompt = rendered(dataclasses.replace(dialogue, messages=tuple(messages)), system)
    return prompt.removeprefix(f"<|im_start|>system\n{system}<|im_end|>")


def test_no_newline_follows_the_end_of_a_turn():
    assert text("a", "b", "c", "d") == (
        "<|im_start|>user\na<|im_end|><|im_start|>assistant\nb<|im_end|>"
        "<|im_start|>user\nc<|im_end|><|im_start|>assistant\nd<|im_end|>"
    )


def test_texts_are_stripped_in_training():
    assert text("  a\n", "\tb ") == text("a", "b")


def test_an_unmarked_image_stands_before_the_question():
    assert text("a", "b", images=1) == text("<image>\na", "b", images=1)
    assert "user\n<img><IMG_CONTEXT></img>\na<|im_end|>" in text("a", "b", images=1)
    assert text("a", "b", images=2) == text("<image>\n<image>\na", "b", images=2)


def test_images_may_come_in_later_questions():
    assert "user\nc <img><IMG_CONTEXT></img><|im_end|>" in text("a", "b", "c <image>", "d", images=1)


def test_video_frames_take_a_line_each():
    frames = "Frame1:<img><IMG_CONTEXT></img>\nFrame2:<img><IMG_CONTEXT></img>\na"
    assert f"user\n{frames}<|im_end|>" in text("<video>\na", "b", frames=[2])
    assert text("a", "b", frames=[2]) == text("<video>\na", "b", frames=[2])
    assert text("<image>\na", "b", frames=[2]) == text("<video>\na", "b", frames=[2])


def test_the_conversations_own_system_text_comes_first():
    dialogue = chat.read_conversation([turn("system", "T"), turn("human", "a"), turn("gpt", "b")])
    assert rendered(dialogue, "S").startswith("<|im_start|>system\nT<|im_end|>")
    without = chat.read_conversation([turn("human", "a"), turn("gpt", "b")])
    assert rendered(without).startswith(f"<|im_start|>system\n{TEMPLATE.system}<|im_end|>")
    assert rendered(without, "").startswith("<|im_start|>system\n<|im_end|>")


def test_an_opening_answer_is_dropped():
    dialogue = chat.read_conversation([turn("gpt", "hello"), turn("human", "a"), turn("gpt", "b")])
    assert dialogue.messages == (("a",), ("b",))


def test_a_question_leaves_the_prompt_open():
    prompt = rendered(chat.Dialogue((("c",), ("d",), ("e",))), "S")
    assert prompt.endswith(
        "c<|im_end|><|im_start|>assistant\nd<|im_end|><|im_start|>user\ne<|im_end|><|im_start|>assistant\n"
    )


def test_a_message_shows_before_it_says():
    assert chat.message(" a ") == (" a ",)
    assert chat.message("a", [IMAGE, IMAGE], [VideoSize(2, 8, 8)], "\n") == (
        *(IMAGE, "\n", IMAGE, "\n", VideoSize(2, 8, 8), "\n"),
        "a",
    )
    assert chat.message(["a", IMAGE, "b"], [IMAGE]) == (IMAGE, "a", IMAGE, "b")


def test_markers_are_read_in_the_questions_of_a_training_conversation_alone():
    assert chat.marked(["a<image>", "b<image>", "<video>c"], [IMAGE], ["clip"]) == (
        ("a", IMAGE, ""),
        ("b<image>",),
        ("", "clip", "c"),
    )
    said = chat.Dialogue((("a <image> <video>", IMAGE), ("b <image>",), ("c",)))
    assert said.shown == [IMAGE]
    assert "user\na <image> <video><img><IMG_CONTEXT></img><|im_end|>" in rendered(said)


def test_control_tokens_of_the_template_are_told_from_text_that_reads_the_same():
    control = list(TEMPLATE.control_tokens)
    pieces = chat.render(chat.Dialogue((("".join(control), IMAGE),)), TEMPLATE, "".join(control))
    texts = [piece for piece in pieces if not isinstance(piece, chat.Control)]
    assert texts.count("".join(control)) == 2
    found = [str(piece) for piece in pieces if isinstance(piece, chat.Control)]
    start, end, *image = control
    assert found == [start, end, start, *image, end, start]


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "alternate human, gpt and end with gpt; got none"),
        ([turn("human", "a")], "end with gpt; got human"),
        ([turn("human", "a"), turn("human", "b")], "got human, human"),
        ([turn("human", "a"), turn("gpt", "b"), turn("human", "c")], "got human, gpt, human"),
        ([turn("human", "a"), turn("gpt", " \n")], "an answer must not be empty, but answer 1 is"),
        ([turn("human", "a"), turn("system", "b")], r"needs `from` \(human \| gpt\).*message 2"),
        ([turn("user", "a")], r"needs `from` \(system \| human \| gpt\).*message 1"),
        ([{"from": "human"}], "a text `value`"),
        ([turn("human", [3])], "a text `value`"),
        (["a", "b"], "message 1 is 'a'"),
        ("a", "must be a list of messages, got 'a'"),
        (None, "must be a list of messages, got None"),
        ([turn("human", "<image>"), turn("gpt", "b")], "holds 1 <image> but there are 0 images"),
        ([turn("human", "a"), turn("gpt", "an <image>")], "in a question only"),
    ],
)
def test_bad_conversations(conversation, message):
    with pytest.raises(ValueError, match=message):
        chat.read_conversation(conversation)


@pytest.mark.parametrize("marked", [1, 3])
def test_markers_must_match_the_images(marked):
    with pytest.raises(ValueError, match=f"holds {marked} <image> but there are 2 images"):
        text("<image>" * marked, "b", images=2)


@pytest.mark.parametrize("token", TEMPLATE.control_tokens)
def test_text_to_be_learned_holds_no_control_tokens(token):
    with pytest.raises(ValueError, match=f"must not hold the control token {token}; got 'a {token}'"):
        chat.check_text(f"a {token}", TEMPLATE)


def test_unknown_template():
    with pytest.raises(ValueError, match=r"one of \['internlm2-chat', .*'qwen-vl-steps', .*\], got 'vicuna'"):
        chat.template("vicuna")
