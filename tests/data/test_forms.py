"""Training data in the forms that people have, and what is refused rather than left out."""

import json

import pytest

from vlmem_jax.data.forms import read_line, short
from vlmem_jax.data.jsonl import as_record
from vlmem_jax.processing import chat

ASKED, SAID = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}
TURNS = [ASKED, SAID]
OPENAI = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize(
    "turns", [TURNS, OPENAI, [{"from": "user", "value": "What?"}, {"from": "Assistant", "value": "A dog."}]]
)
def test_roles_by_any_of_their_names(key, turns):
    assert read_line({key: turns}).conversations == TURNS


@pytest.mark.parametrize("media", ["a.png", ["a.png"], [{"path": "a.png"}], {"path": "a.png"}])
@pytest.mark.parametrize(("key", "kind"), [("image", 1), ("images", 1), ("video", 2), ("videos", 2)])
def test_images_and_videos_by_either_name(media, key, kind):
    said = read_line({"conversations": TURNS, key: media})
    assert said[kind] == ("a.png",) and said[3 - kind] == ()


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
        [{"type": "image", "path": "a.png"}, "What?"],
        [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}],
        [{"type": "image_url", "image_url": "a.png"}, {"type": "text", "text": "What?"}],
    ],
)
def test_parts_name_their_files_or_take_them_in_turn(content):
    messages = [{"role": "user", "content": content}, OPENAI[1]]
    assert read_line({"messages": messages}).images == ("a.png",)
    assert read_line({"messages": messages}).conversations[0]["value"] == [{"type": "image"}, "What?"]
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}, OPENAI[1]]
    assert read_line({"messages": bare, "images": ["b.png"]}).images == ("b.png",)
    with pytest.raises(ValueError, match="this line has both"):
        read_line({"messages": messages, "images": ["b.png"]})


def test_the_text_of_a_part_is_no_marker():
    image = object()
    parts = [{"type": "image"}, "Is <image> a tag, and <video>?"]
    dialogue = chat.read_conversation([{"from": "human", "value": parts}, SAID], [image])
    assert dialogue.messages[0] == (image, "Is <image> a tag, and <video>?")
    unmarked = chat.read_conversation([{"from": "human", "value": ["What?"]}, SAID], [image])
    assert unmarked.messages[0] == (image, "\n", "What?"), "before the first question, as of a text"


@pytest.mark.parametrize("flag", [{"loss": False}, {"weight": 0}])
def test_a_message_may_be_left_unlearned(flag):
    turns = [ASKED, SAID | flag, ASKED, SAID]
    read = chat.read_conversation(read_line({"conversations": turns}).conversations)
    assert read.learned == (False, True)


@pytest.mark.parametrize(
    "first", [{}, {"from": "system", "value": "Be terse."}, {"role": "developer", "content": "Be terse."}]
)
def test_the_system_text_may_be_a_key_or_a_message(first):
    line = {"conversations": [first, *TURNS]} if first else {"conversations": TURNS, "system": "Be terse."}
    assert chat.read_conversation(read_line(line).conversations).system == "Be terse."


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("Image", "image"), ("image_path", "image"), ("imagePath", "image"), ("img", "image"), ("Images", "image"),
        ("image_url", "image"), ("pictures", "image"), ("video_path", "video"), ("Videos", "video"), ("vid", "video"),
    ],
)  # fmt: skip
def test_a_key_that_is_nearly_one_is_not_left_out(key, meant):
    with pytest.raises(ValueError, match=f"there is no key `{key}`; it must be called `{meant}`"):
        read_line({"conversations": TURNS, key: "a.png"})
    assert read_line({"conversations": TURNS, key: None}).ignored == ()


def test_other_keys_are_counted_unless_they_are_empty():
    line = {"conversations": TURNS, "id": 3, "width": 640, "tags": [], "note": None, "image_id": 7, "source": "web"}
    assert as_record("a:1", line).ignored == ("width", "image_id")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            {"conversations": [{"from": "human", "value": "broken \ud83d here"}, SAID]},
            r"half of a surrogate pair, '\\ud83d'",
        ),
        ({"conversations": TURNS, "images": [{"bytes": "aGk=", "path": None}]}, "`vlmem data convert` writes it"),
        ({"conversations": TURNS, "images": 3}, "`images` must be a path or a list of paths, got 3"),
        ({"conversations": TURNS, "system": 3}, "`system` must be a text"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'"),
        ({"conversations": [ASKED, {"from": "system", "value": "x"}]}, "message 2 is from 'system'"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be a text or a list of parts, got 3"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "of type text, image or video"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": [{"type": "image"}]}]}, "only the user may show"),
        ({"messages": [{"content": "x"}]}, "needs {from, value} or {role, content}"),
        ({"conversations": TURNS, "videos": ["a.mp4", "b.mp4"]}, "one video at most"),
    ],
)
def test_what_has_none_of_the_forms(line, reason):
    with pytest.raises(ValueError, match=reason):
        as_record("a:1", line)


def test_no_message_shows_much_of_the_data():
    long = "x" * 100_000
    for line in ({"conversations": TURNS, "images": [[long]]}, {"conversations": long}, {"messages": [{"role": long}]}):
        with pytest.raises(ValueError) as error:
            as_record("a:1", line)
        assert len(str(error.value)) < 400
    assert len(short(long)) < 160 and json.dumps(short(3)) == '"3"'
