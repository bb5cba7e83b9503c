"""Questions about long videos, in the files that benchmarks are released in, as lines of prompts: Video-MME (arXiv
2405.21075), MLVU (arXiv 2406.04264), VStream-QA (arXiv 2406.08085) and HD-EPIC (arXiv 2502.04144).

A line has the question as it is put to a model, with its options, and both by themselves: `question` and `choices`,
for who asks a memory. Where a video is shown in part, nothing beyond is seen.
"""

import os
import pathlib
import re
import string
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlmem_jax.data.benchmarks import LETTER
from vlmem_jax.data.convert import Origin
from vlmem_jax.data.forms import check_object, short
from vlmem_jax.data.long_videos import frames_of_seconds, frames_of_shots, in_order, named, option_letter, shot_of
from vlmem_jax.data.values import values
from vlmem_jax.processing import media

MOST_FRAMES = 128
"""Of VStream-QA, which gives them as files, that are shown; as MM-Mem's release shows it."""
_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]\s+")
_CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)")


class VideoMME(Origin):
    """Video-MME: `videoID`, `question`, `options` with their letters and `answer`; a question's source is how long its
    video is, by which it is reported. Videos are NAME.mp4, and subtitles NAME.srt."""

    def line(self, value: Any) -> dict[str, Any]:
        """Raises ValueError, naming the field, for what cannot be asked."""
        check_object(value)
        name = _text(value, "videoID")
        options = _texts(value, "options")
        return _asked(
            value,
            options=[_LETTERED.sub("", option, count=1) for option in options],
            letter=_text(value, "answer").strip().rstrip("."),
            id=value.get("question_id"),
            video=f"{name}.mp4",
            source=_text(value, "duration"),
            subtitles=f"{name}.srt",
            **_kept(value, "domain", "sub_category", "task_type"),
        )


class MLVU(Origin):
    """MLVU: `video`, `question`, and `candidates`, of which one is the `answer`, or none where one writes. Files are
    called N_KIND.json, and their videos stand in folders called so."""

    def values(self, source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
        """Each with the folder of its video."""
        stem = pathlib.Path(source).stem
        folder = f"{stem}/" if re.fullmatch(r"\d+_\w+", stem) else ""
        for name, value in values(source):
            yield name, value | {_FOLDER: folder} if isinstance(value, dict) else value

    def line(self, value: Any) -> dict[str, Any]:
        """Raises ValueError, naming the field, for what cannot be asked."""
        check_object(value)
        options, answer = value.get("candidates") or [], _text(value, "answer")
        about = {"video": f"{value.get(_FOLDER, '')}{_text(value, 'video')}", "source": _text(value, "question_type")}
        about |= {"id": value.get("question_id")} | _kept(value, "duration")
        if not options:
            return _open(value, answer, **about)
        options = _texts(value, "candidates")
        places = [n for n, option in enumerate(options) if option.strip() == answer.strip()]
        if not places:
            raise ValueError(f"`answer` must be one of `candidates`, {short(options)}; got {short(answer)}")
        return _asked(value, options, option_letter(places[0]), **about)


class HDEpic(Origin):
    """HD-EPIC: `inputs`, videos and images by name, perhaps parts of them; `question`, `choices` and `correct_idx`.
    Videos are PARTICIPANT/ID.mp4, the first part of the id."""

    def values(self, source: str | os.PathLike) -> Iterator[tuple[str, Any]]:
        """Files are objects of questions by their ids, and called by their kind."""
        kind = pathlib.Path(source).stem
        for name, value in values(source):
            check_object(value)
            for question, fields in value.items():
                where = f"{name}: {question}"
                yield where, fields | {"id": question, _KIND: kind} if isinstance(fields, dict) else fields

    def line(self, value: Any) -> dict[str, Any]:
        """Raises ValueError, naming the field, for what cannot be asked."""
        check_object(value)
        inputs, place = value.get("inputs"), value.get("correct_idx")
        if not isinstance(inputs, dict) or not (videos := in_order(named(inputs))):
            raise ValueError(f"`inputs` must name videos or images with their ids, got {short(inputs)}")
        options = _texts(value, "choices")
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
            raise ValueError(f"`correct_idx` must number one of the {len(options)} `choices`, got {short(place)}")
        about = {"id": value.get("id"), "source": value.get(_KIND) or None}
        line = _asked(value, options, option_letter(place), **about)
        shown = [_part_of(name, video, inputs[name]) for name, video in videos.items()]
        if len(shown) == 1:
            return line | {"videos": shown}
        parts = [part for name, one in zip(videos, shown, strict=True)
                 for part in (f"{name}: ", {"video": one.pop("path")} | one, "\n")]  # fmt: skip
        return line | {"prompt": [*parts, line["prompt"]]}


class VStream(Origin):
    """VStream-QA: `video_id`, a folder of frames, a second each or shot by shot; `question`, `answer`, and `end_time`,
    when it is asked, by seconds or by the name of a frame. Its frames up to then are shown, thinned out, from the
    folder `root`; a memory of that folder, a frame a second, is asked `until` then."""

    def __init__(self, root: str, follow_links: bool = False):
        """`root`: the folder of folders of frames; `follow_links`: links below it may lead out of it."""
        self.root, self.follow_links = root, follow_links
        self._names: dict[str, list[str]] = {}

    def line(self, value: Any) -> dict[str, Any]:
        """Raises ValueError, naming the field, for what cannot be asked, or would be seen with what comes later."""
        check_object(value)
        video, end = _text(value, "video_id"), value.get("end_time")
        names = self._frames(video)
        if isinstance(end, str) and (shot := shot_of(end)):
            shown = frames_of_shots(names, None, shot)
        elif (time := _seconds(end)) is not None:
            shown = frames_of_seconds(names, 0, time)
        else:
            raise ValueError(f"`end_time` must be seconds or the name of a frame, got {short(end)}")
        if not shown:
            raise ValueError(f"`end_time` {short(end)} comes before the first frame of {video}")
        places = np.linspace(0, len(shown) - 1, min(len(shown), MOST_FRAMES)).astype(int).tolist()
        about = {"id": value.get("id"), "source": value.get("answer_type"), "memory": video}
        about |= {"until": float(len(shown) - 1), "images": [f"{video}/{shown[n]}" for n in places]}
        return _open(value, _text(value, "answer"), **about)

    def _frames(self, video: str) -> list[str]:
        if video not in self._names:
            folder = media.resolve(self.root, video, self.follow_links)
            try:
                self._names[video] = os.listdir(folder)
            except OSError as error:
                raise ValueError(f"frames of {video} must be in a folder; {folder}: {error.strerror}") from error
        return self._names[video]


_FOLDER, _KIND = "_folder", "_kind"


def _part_of(name: str, video: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A video, or a part of it; of an image the frame of its time."""
    shown: dict[str, Any] = {"path": f"{video.split('-')[0]}/{video}.mp4"}
    keys = {"start_time": "start", "end_time": "end"} if name.startswith("video") else {"time": "start"}
    for key, called in keys.items():
        if fields.get(key) is None:
            continue
        if (time := _seconds(fields[key])) is None:
            raise ValueError(f"`inputs.{name}.{key}` must be seconds or HH:MM:SS, got {short(fields[key])}")
        shown[called] = time
    if name.startswith("video"):
        return shown
    if "start" not in shown:
        raise ValueError(f"`inputs.{name}` must have the `time` of its frame, got {short(dict(fields))}")
    return shown | {"end": shown["start"], "frames": 1}


def _seconds(value: Any) -> float | None:
    """Of a number, or of HH:MM:SS; None for what is neither."""
    if isinstance(value, str):
        if found := _CLOCK.fullmatch(value.strip()):
            hours, minutes, seconds = found.groups(default="0")
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        value = float(value) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value.strip()) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < 1e9 else None


def _asked(fields: Mapping[str, Any], options: list[str], letter: str, **about: Any) -> dict[str, Any]:
    """A line of a question with options."""
    question = _text(fields, "question")
    letters = string.ascii_uppercase[: len(options)]
    if len(options) > len(string.ascii_uppercase) or len(letter) != 1 or letter not in letters:
        raise ValueError(
            f"the answer must be the letter of one of the options, {', '.join(letters)}; got {letter!r:.60}"
        )
    listed = [f"{one}. {option}" for one, option in zip(letters, options, strict=True)]
    asked = {"prompt": "\n".join([question, *listed, LETTER]), "question": question}
    return asked | {"choices": options, "answer": letter, "answer_type": "choice"} | about


def _open(fields: Mapping[str, Any], answer: str, **about: Any) -> dict[str, Any]:
    """A line of a question that is answered in words, which a judge reads."""
    question = _text(fields, "question")
    return {"prompt": question, "question": question, "answer": answer, "answer_type": "judge"} | about


def _kept(fields: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: fields[key] for key in keys if fields.get(key) is not None}


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` must be a text, got {short(value)}")
    return value


def _texts(fields: Mapping[str, Any], key: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"`{key}` must be a list of texts, got {short(value)}")
    return value
