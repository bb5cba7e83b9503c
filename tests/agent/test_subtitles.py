"""Subtitles, whoever wrote them."""

import re
import time

import pytest

from vlmem_jax.agent import subtitles
from vlmem_jax.agent.nodes import Cue
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.subtitles import SILENT, Track, parse_subtitles, read_subtitles, with_said

TEXT = """1
00:00:01,000 --> 00:00:02,500 X1:40 X2:600
<i>Mind</i>  the
{\\an8}gap

2
01:00:00.5 --> 01:00:01
Über <b>drei</b> < vier
"""
CUES = [Cue(0, 1.0, 2.5, "Mind the gap"), Cue(1, 3600.5, 3601.0, "Über drei < vier")]


def test_cues_have_times_and_plain_words():
    assert parse_subtitles(TEXT) == parse_subtitles(TEXT.replace("\n", "\r\n")) == CUES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_of_several_encodings(tmp_path, encoding):
    """The first line is one of times, so nothing may stand before it."""
    (tmp_path / "a.srt").write_text(TEXT.removeprefix("1\n"), encoding=encoding)
    assert read_subtitles(tmp_path / "a.srt") == CUES


def test_cues_come_in_the_order_of_time():
    text = "00:00:05,000 --> 00:00:06,000\nlater\n\n00:00:01,000 --> 00:00:02,000\nsooner\n"
    assert [(cue.number, cue.text) for cue in parse_subtitles(text)] == [(0, "sooner"), (1, "later")]


def test_empty_cues_and_those_that_end_before_they_begin_are_left_out():
    text = (
        "1\n00:00:01,0 --> 00:00:02,0\n<i></i>\n\n2\n00:00:04,0 --> 00:00:03,0\nback\n\n"
        "3\n00:00:05,0 --> 00:00:05,0\nflash"
    )
    assert [cue.text for cue in parse_subtitles(text)] == ["flash"]


def test_cues_without_empty_lines_between_them():
    text = "1\n00:00:01,0 --> 00:00:02,0\nin 1\n984\n2\n00:00:03,0 --> 00:00:04,0\nnext\n"
    assert [cue.text for cue in parse_subtitles(text)] == ["in 1 984", "next"]


def test_what_is_said_in_a_stretch_of_time():
    track = Track([Cue(0, 0.0, 2.0, "a"), Cue(1, 2.0, 5.0, "b"), Cue(2, 3.0, 3.0, "flash"), Cue(3, 4.0, 9.0, "c")])
    assert track.said(Span(2.0, 3.0)) == "b" and track.said(Span(3.0, 4.0)) == "b\nflash"
    assert track.said(Span(4.5, 6.0)) == "b\nc" and track.said(Span(9.0, 10.0)) == ""
    assert track.said(Span(0.0, 1.0), Span(4.0, 4.1)) == "a\nb\nc" and track.said() == ""
    assert with_said("seen", track.said(Span(0.0, 1.0))) == "seen\nSaid: a"
    assert with_said("seen", SILENT.said(Span(0.0, 9.0))) == "seen"


def test_of_much_that_is_said_lines_from_all_of_it_are_told():
    track = Track([Cue(n, float(n), n + 1.0, f"line {n:03}") for n in range(300)])
    told = track.said(Span(0.0, 300.0)).splitlines()
    assert told[0] == "line 000" and told[-1] == "line 299" and 100 < len(told) < 128
    assert len(Track([Cue(0, 0.0, 1.0, "x" * 5000)]).said(Span(0.0, 1.0))) == 1024


def test_cues_by_when_they_begin():
    track = Track([Cue(0, 0.0, 9.0, "a"), Cue(1, 2.0, 5.0, "b")])
    assert track.begun(0.0, 2.0) == [track.cues[0]] and track.begun(2.0, 99.0) == [track.cues[1]]
    assert track.digest == Track(track.cues).digest != Track(track.cues[:1]).digest and SILENT.digest == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", r"must be UTF-8 or UTF-16, .*byte 0xe9 in position 3.*iconv"),
        (b"\xff\xfea", "must be UTF-8 or UTF-16"),
        (b"WEBVTT\n\nhello", "hold no cue: a line like 00:00:01,000 -->"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "a.srt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"subtitles .*a\.srt {message}"):
        read_subtitles(tmp_path / "a.srt")


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "a.srt").write_bytes(b"\n\n")
    assert read_subtitles(tmp_path / "a.srt") == []
    with pytest.raises(ValueError, match=r"subtitles .*none\.srt does not exist"):
        read_subtitles(tmp_path / "none.srt")
    with pytest.raises(ValueError, match="it is a folder, no file"):
        read_subtitles(tmp_path)


def test_large_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(subtitles, "LARGEST", 100)
    (tmp_path / "a.srt").write_text(TEXT)
    size = len(TEXT.encode())
    with pytest.raises(ValueError, match=re.escape(f"a.srt have {size} bytes, but at most 100 are read")):
        read_subtitles(tmp_path / "a.srt")


HOSTILE = {
    "tags that never end": "00:00:01,0 --> 00:00:02,0\n" + "<" * 200_000,
    "styles that never end": "00:00:01,0 --> 00:00:02,0\n" + "{\\" * 100_000,
    "spaces": " " * 200_000 + "\n" + "1" * 200_000,
    "cues": "00:00:01,0 --> 00:00:02,0\n1\n" * 20_000,
    "digits": "9" * 100_000 + ":00:00 --> " + "9" * 100_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_text_is_read_in_linear_time(kind):
    began = time.process_time()
    parse_subtitles(HOSTILE[kind])
    assert time.process_time() - began < 2, "quadratic time would be some minutes"
