import pytest

from tests.patches_world import save_tokenizer
from vlmem_jax.generate import Transcript
from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer

SPEECH = Speech(
    ("short", "long"), (156, 158), (157, 159), (3, 5), max_invocations=4, max_states=64, max_visual=64, start_id=0
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def shown(tokenizer, parts, **options):
    """What is shown of an answer whose parts are texts and ids, and the transcript."""
    transcript = Transcript(tokenizer, SPEECH, **options)
    ids = [i for part in parts for i in (tokenizer.encode(part) if isinstance(part, str) else [part])]
    return "".join([*map(transcript.push, ids), transcript.flush()]), transcript


def test_memories_are_no_text_unless_asked_for(tokenizer):
    parts = "ab", 156, 157, "c", 158, 159, "d"
    plain, transcript = shown(tokenizer, parts)
    assert plain == transcript.text == "abcd"
    noted, transcript = shown(tokenizer, parts, show_memory=True)
    assert noted == "ab[short memory, 3 latent tokens]c[long memory, 5 latent tokens]d"
    assert transcript.text == "abcd"


def test_a_memory_stands_where_it_was_called_for(tokenizer):
    _, transcript = shown(tokenizer, ("ab", 156, 157, "c", 158, 159))
    assert transcript.called == [("short", 2), ("long", 4)] and transcript.chosen == 5


def test_a_memory_is_of_the_kind_that_ends_it_and_a_call_without_answer_is_none(tokenizer):
    reversed_, transcript = shown(tokenizer, (156, 159, "a", 158, "b"), show_memory=True)
    assert reversed_ == "[long memory, 5 latent tokens]ab"
    assert transcript.called == [("long", 0)] and transcript.chosen == 4


class Bytes(Tokenizer):
    """An id is a byte."""

    def __init__(self):
        pass

    def decode(self, ids, skip_special=True):
        return bytes(ids).decode(errors="replace")


def test_a_memory_does_not_split_a_character():
    transcript = Transcript(Bytes(), SPEECH, show_memory=True)
    assert [transcript.push(i) for i in (0xC3, 156, 157, 0xA9)] == ["", "", "[short memory, 3 latent tokens]", "é"]


@pytest.mark.parametrize(
    "parts, until, text",
    [
        (("ab", "c", "d", "ef"), ("cde",), "ab"),
        (("abc", "dx", "cd", "e"), ("cde", "zz"), "abcdx"),
        (("ab", "cb", "cd"), ("bcd", "bc"), "a"),
        (("abcd",), ("de", ""), "abcd"),
    ],
    ids=["across tokens", "a false start", "the first that comes", "a start alone"],
)
def test_a_text_ends_an_answer_wherever_tokens_part_it(tokenizer, parts, until, text):
    said, transcript = shown(tokenizer, parts, until=until)
    assert said == transcript.text == text
    assert transcript.ended == (text != "abcd")


def test_what_may_begin_an_end_is_held_back(tokenizer):
    transcript = Transcript(tokenizer, SPEECH, until=["cde"])
    assert [transcript.push(i) for i in tokenizer.encode("abcdfcde")] == ["a", "b", "", "", "cdf", "", "", ""]
