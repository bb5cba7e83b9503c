"""Subtitles of a video as SRT files have them. They come from anybody: a file of any content is read in linear time."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlmem_jax.agent.nodes import Cue
from vlmem_jax.agent.segments import Span, evenly
from vlmem_jax.processing.media import check_file

LARGEST = 8 << 20
"""Bytes of a file; a day of talk has some 3 MiB."""
MOST = 1024
"""Characters of what is said in a node; nobody says as much in ten seconds."""

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


class Track:
    """What is said in a video, and when."""

    def __init__(self, cues: Sequence[Cue] = ()):
        self.cues = tuple(cues)
        self._start_N = np.array([cue.start for cue in cues], np.float64)
        self._end_N = np.array([cue.end for cue in cues], np.float64)

    def said(self, *spans: Span, most: int = MOST) -> str:
        """What is said in stretches of time, a line a cue, in the order of their beginnings; of more than `most`
        characters, lines from all of it. It says nothing that begins later than all of them end."""
        is_said_N = np.zeros(len(self.cues), bool)
        for start, end in spans:
            is_said_N |= (self._start_N < end) & ((self._end_N > start) | (self._start_N == start))
        lines = [self.cues[n].text for n in np.flatnonzero(is_said_N).tolist()]
        if (length := sum(map(len, lines)) + len(lines)) > most:
            lines = [lines[n] for n in evenly(len(lines), max(len(lines) * most // length, 1)).tolist()]
        return "\n".join(lines)[:most]

    def begun(self, start: float, end: float) -> list[Cue]:
        """The cues that begin from one time on, and before another."""
        return [self.cues[n] for n in np.flatnonzero((self._start_N >= start) & (self._start_N < end)).tolist()]

    @property
    def digest(self) -> str:
        """Tells it from others; 32 hexadecimal digits, and nothing where nothing is said."""
        content = json.dumps([[cue.start, cue.end, cue.text] for cue in self.cues]).encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest() if self.cues else ""


SILENT = Track()
"""A video without subtitles."""


def with_said(caption: str, said: str) -> str:
    """A caption, with what is said meanwhile."""
    return f"{caption}\nSaid: {said}" if said else caption


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
