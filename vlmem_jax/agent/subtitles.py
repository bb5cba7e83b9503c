"""Subtitles of a video as SRT files have them. They come from anybody: a file of any content is read in linear time."""

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vlmem_jax.agent.nodes import Cue
from vlmem_jax.processing.media import check_file

LARGEST = 8 << 20
"""Bytes of a file; a day of talk has some 3 MiB."""

_TIME = r"\d{1,4}:\d{1,2}:\d{1,2}(?:[.,]\d{1,9})?"
_TIMES = re.compile(rf"\s*({_TIME})\s*-->\s*({_TIME})")
_TAG = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")
"""Of HTML, and of the styles that editors leave in."""


class _Block(NamedTuple):
    """A cue as it is written."""

    start: str
    end: str
    text: str


def read_subtitles(file: str | os.PathLike) -> list[Cue]:
    """The cues of an SRT file, in UTF-8 or UTF-16. Raises ValueError, naming the file, for anything else."""
    check_file(file, "subtitles")
    size = os.path.getsize(file)
    if size > LARGEST:
        raise ValueError(f"subtitles {file} have {size} bytes, but at most {LARGEST} are read; split the file")
    with open(file, "rb") as opened:
        content = opened.read(LARGEST)
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"subtitles {file} must be UTF-8 or UTF-16, {error}; iconv converts them") from error
    cues = parse_subtitles(text)
    if not cues and text.strip():
        raise ValueError(f"subtitles {file} hold no cue: a line like 00:00:01,000 --> 00:00:02,500, then its text")
    return cues


def parse_subtitles(text: str) -> list[Cue]:
    """The cues of an SRT text in the order of their beginnings, in plain words; those without any, or that end before
    they begin, are left out."""
    spans = ((_seconds(block.start), _seconds(block.end), block.text) for block in _blocks(text))
    found = sorted((start, end, words) for start, end, words in spans if words and start <= end)
    return [Cue(number, *one) for number, one in enumerate(found)]


def release_transcript(text: str) -> str:
    """A line a cue, as the baselines of MM-Mem's release put them before a question: its beginning as it is written up
    to the comma, then its words."""
    return "\n".join(f"[{one.start.partition(',')[0]}] {one.text}" for one in _blocks(text) if one.text)


def said(cues: Iterable[Cue], start: float, end: float) -> str:
    """What is said between two times, a line a cue."""
    return "\n".join(cue.text for cue in cues if cue.start < end and cue.end > start)


def _blocks(text: str) -> Iterator[_Block]:
    """Cues, each from its line of times up to an empty line or the next line of times."""
    times, lines = None, []
    for line in [*text.splitlines(), ""]:
        found = _TIMES.match(line)
        if times and (found or not line.strip()):
            if found and lines and lines[-1].strip().isdigit():  # its number, where no empty line stands between
                lines.pop()
            yield _Block(*times, " ".join(_TAG.sub("", " ".join(lines)).split()))
            times, lines = None, []
        if found:
            times = found.groups()
        elif times:
            lines.append(line)


def _seconds(written: str) -> float:
    hours, minutes, seconds = written.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
