"""Questions of benchmarks about space in videos, in the files that they are released in, as lines of prompts.

Read are VSI-Bench (arXiv 2412.14171) and VSTI-Bench (arXiv 2505.20279), which are asked as their own scorers ask them,
and ScanQA (arXiv 2112.10482) and SQA3D (arXiv 2210.07474), asked of the video of a scene in the same words.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from vlmem_jax.data.forms import check_object, short
from vlmem_jax.data.values import values
from vlmem_jax.processing.media import check_file
from vlmem_jax.scoring import vsi

T = TypeVar("T")
Fields = dict[str, Any]

OPENING = "These are frames of a video."
LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Please answer the question using a single word or phrase."
NEW_TOKENS = 16
"""Longest answer that benchmarks have, tokens."""


class Benchmark(NamedTuple):
    """How the questions of a benchmark are read, and what their answers are worth."""

    read: Callable[[Fields], Fields]
    """From a value of its file to a line of prompts. Raises ValueError, naming the field, for what is not there."""
    metric: str
    """See `scoring.RewardConfig.name`."""
    captions: bool = False
    """Whether answers are compared with references as captions are, too."""


class Questions:
    """The questions of a file of a benchmark, as `jsonl.JsonLines` has lines. Reading is safe from many threads."""

    def __init__(self, path: str, benchmark: str):
        """Raises ValueError if there is no such file, no question in it, or if it cannot be read."""
        check_file(path, "data file")
        self.path = path
        self._read = BENCHMARKS[benchmark].read
        files = [path]
        self._values = list(_questions(path, files))
        if not self._values:
            raise ValueError(f"data must have at least one question, but {path} has none")
        content = hashlib.blake2b(digest_size=16)
        for file in files:
            with open(file, "rb") as opened:
                content.update(opened.read())
        self.digest = content.hexdigest()
        """Of all files that the questions were read of."""

    def __len__(self) -> int:
        return len(self._values)

    def name(self, index: int) -> str:
        """Where question `index` stands."""
        return self._values[index][0]

    def read(self, index: int, form: Callable[[str, Any], T]) -> T:
        """What `form(name, line)` makes of a question as a line of prompts. Raises ValueError, naming question and
        field, for what it cannot be asked without."""
        name, value = self._values[index]
        try:
            check_object(value)
            return form(name, self._read(value))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _questions(path: str, files: list[str]) -> Iterator[tuple[str, Any]]:
    """The questions of a file with their names; what is read beside it is added to `files`."""
    for name, value in values(path):
        if not isinstance(value, dict) or not isinstance(value.get("questions"), list):
            yield name, value
            continue
        files.append(_annotations_of(path))
        answers = _annotated(files[-1])
        for number, question in enumerate(value["questions"], 1):
            if isinstance(question, dict):
                question = {"answers": answers.get(str(question.get("question_id")))} | question
            yield f"{path}: question {number}", question


def _annotations_of(path: str) -> str:
    """The file of the answers to SQA3D's file of questions, which is released beside it."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, name.replace("questions", "sqa_annotations"))
    if beside == path or not os.path.isfile(beside):
        raise ValueError(
            f"{path} has questions without answers; those are read of a file beside it that is called so, with "
            "sqa_annotations in place of questions, and there is none"
        )
    return beside


def _annotated(path: str) -> dict[str, Any]:
    """The answers of a file of annotations by question_id."""
    found = {}
    for name, value in values(path):
        annotations = value.get("annotations") if isinstance(value, dict) else None
        if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
            raise ValueError(f"{name}: `annotations` must be a list of objects, got {short(annotations)}")
        found |= {str(one.get("question_id")): one.get("answers") for one in annotations}
    return found


# --- a question as a line of prompts ----------------------------------------------------------------------------------


def _vsi(fields: Fields, video: str, choice: str) -> Fields:
    """`video`: its path; `choice`: the field of the letter of a choice."""
    kind = _text(fields, "question_type")
    wanted = vsi.KINDS.get(kind)
    if wanted is None:
        raise ValueError(f"`question_type` must be one of {', '.join(vsi.KINDS)}; got {kind!r}")
    question, closing, key = [_text(fields, "question")], PHRASE, "ground_truth"
    if wanted == "choice":
        options, closing, key = fields.get("options"), LETTER, choice
        if not isinstance(options, list) or not options or not all(isinstance(option, str) for option in options):
            raise ValueError(f"`options` must be a list of texts, got {short(options)}")
        question += ["Options:", *options]
    answer = fields.get(key)
    if wanted == "choice" and answer not in (letters := [option.strip()[:1] for option in options]):
        raise ValueError(f"`{key}` must be the letter of one of `options`, {', '.join(letters)}; got {short(answer)}")
    if wanted == "number" and not _is_number(answer):
        raise ValueError(f"`{key}` must be a number, got {short(answer)}")
    asked = _asked(fields.get("id"), kind, video, question, closing)
    return asked | {"answers": [str(answer)], "answer_type": wanted}


def _vsibench(fields: Fields) -> Fields:
    return _vsi(fields, f"{_text(fields, 'dataset')}/{_text(fields, 'scene_name')}.mp4", "ground_truth")


def _vstibench(fields: Fields) -> Fields:
    return _vsi(fields, _text(fields, "video_path"), "mc_answer")


def _scanqa(fields: Fields) -> Fields:
    question = _text(fields, "question")
    return _scene(fields, _first(question, SCANQA_KINDS), question, fields.get("answers") or [])  # tests have none


def _sqa3d(fields: Fields) -> Fields:
    question, kinds = _text(fields, "question"), ("what", "is", "how", "can", "which")
    answers = fields.get("answers")
    if not isinstance(answers, list):
        raise ValueError(f"`answers` must be a list of texts, got {short(answers)}")
    answers = [one.get("answer") if isinstance(one, dict) else one for one in answers]
    asked = f"{_text(fields, 'situation')} {question}"
    return _scene(fields, _first(question, {word: word for word in kinds}), asked, answers)


def _scene(fields: Fields, kind: str, question: str, answers: Any) -> Fields:
    asked = _asked(fields.get("question_id"), kind, f"{_text(fields, 'scene_id')}.mp4", [question], PHRASE)
    return asked | {"answers": answers}


def _asked(name: Any, kind: str, video: str, question: list[str], closing: str) -> Fields:
    return {"id": name, "prompt": "\n".join([OPENING, *question, closing]), "video": video, "source": kind}


def _text(fields: Fields, key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{key}` must be a text, got {short(value)}")
    return value


def _is_number(text: Any) -> bool:
    try:
        return math.isfinite(float(text))
    except (TypeError, ValueError):
        return False


def _first(question: str, kinds: Mapping[str, str]) -> str:
    """The kind of a question by the words that it begins with."""
    words = " ".join(question.lower().split())
    return next((kind for start, kind in kinds.items() if re.match(rf"(?:{start})\b", words)), "other")


SCANQA_KINDS = {
    "what colou?r|what is the colou?r": "color",
    "what type|what shape|what kind": "object nature",
    "where is": "place",
    "how many": "number",
    "what is": "object",
}
"""How ScanQA's paper groups questions, by their first words."""
BENCHMARKS = {
    "vsibench": Benchmark(_vsibench, "vsi"),
    "vstibench": Benchmark(_vstibench, "vsi"),
    "scanqa": Benchmark(_scanqa, "em", captions=True),
    "sqa3d": Benchmark(_sqa3d, "em"),
}
