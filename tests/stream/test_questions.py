"""Questions of the command line, of files and of typed lines."""

import pytest

from vlmem_jax.stream.questions import END, Question, of_file, of_flags, of_line


def test_questions_of_flags_are_asked_at_their_times_or_at_the_end():
    assert of_flags([("a", 3.0), ("b", None)]) == [Question("a", 3.0), Question("b", END)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [([("a", -1.0)], "0 seconds or later, got -1.0"), ([(" ", 1.0)], "must not be empty"),
     ([("a", float("nan"))], "0 seconds or later, got nan")],
)  # fmt: skip
def test_flags_that_are_no_question(flags, message):
    with pytest.raises(ValueError, match=f"--ask: a question .*{message}"):
        of_flags(flags)


def test_a_file_of_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"at": 2, "question": "a"}\n\n{"question": "b?"}\n')
    assert of_file(tmp_path / "q.jsonl") == [Question("a", 2.0), Question("b?", END)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question; a line is"),
        ('{"question": "a"}\n{"question"', r"q\.jsonl:2 must be \{"),
        ('{"ask": "a"}', r"q\.jsonl:1 must be .*got"),
        ('{"question": "a", "when": 3}', "but has the key 'when'"),
        ('{"question": "a", "at": "3"}', "0 seconds or later, got '3'"),
        ('{"question": "a", "at": true}', "0 seconds or later, got True"),
        ("[]", "got \\[\\]"),
    ],
)
def test_a_file_that_holds_others_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        of_file(tmp_path / "q.jsonl")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match="must be UTF-8"):
        of_file(tmp_path / "q.jsonl")


def test_a_line_is_a_question_now_or_an_object():
    assert of_line("  What?\n") == Question("What?") and of_line("\n") is None
    assert of_line('{"at": 5, "question": "a"}') == Question("a", 5.0)
    with pytest.raises(ValueError, match="a line of the standard input must be"):
        of_line("{what?")
