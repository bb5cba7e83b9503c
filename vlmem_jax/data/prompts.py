"""Questions with their accepted answers, from JSONL files: what reinforcement learning and evaluation ask.

A line holds `prompt` and perhaps `id`, `image` or `images`, `video` or `videos` (paths or {path, fps?, frames?, start?,
end?}, of which the last two are seconds, beyond which nothing is seen), `system`, `answer`, `answers`, `answer_type`,
`choices`, `source`, `split` and `prompt_is_raw`; other keys are kept in `meta`. Images and videos stand before the
prompt; where they stand in its midst, `prompt` is a list of texts, {image: path} and {video: path, fps?, ...}. A text
is never searched for markers. In place of `prompt` there may be `messages` or `conversations` in the forms of training
data, whose last answer is the accepted one if there is no other.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image

from vlmem_jax.data.benchmarks import Questions
from vlmem_jax.data.config import SourceConfig
from vlmem_jax.data.forms import check_near, check_object, check_text, paths, read_line, short
from vlmem_jax.data.geometry import image_clip, stores_of, video_clip, with_geometry
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.data.records import SUFFIX
from vlmem_jax.data.samples import Key
from vlmem_jax.processing import Processor, Video, chat, images, media, video
from vlmem_jax.processing.processor import naming
from vlmem_jax.processing.video import VideoSize
from vlmem_jax.types import Sample

ANSWER_TYPES = ("choice", "number", "text", "judge")


@dataclasses.dataclass(frozen=True)
class ImageSource:
    """An image file."""

    path: str


@dataclasses.dataclass(frozen=True)
class VideoSource:
    """A video file, and how many frames to take of it; by default the processor decides."""

    path: str
    fps: float | None = None
    """Frames to take of each second."""
    frames: int | None = None
    """Frames to take in all."""
    start: float = 0.0
    """Of the part that is shown, in seconds, as `end`; nothing beyond is seen."""
    end: float | None = None
    """None: that of the video."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One line: a question, what it shows, and what counts as its answer."""

    name: str
    """`file:line`, counted from 1."""
    id: str
    """Of the line, else its number among those that are not blank, from 0."""
    parts: tuple[str | ImageSource | VideoSource, ...]
    """What it says, and shows in between."""
    history: tuple[tuple[tuple[str | ImageSource | VideoSource, ...], str], ...] = ()
    """What was asked and answered before."""
    images: tuple[str, ...] = ()
    """Paths of what stands before all that is said."""
    videos: tuple[VideoSource, ...] = ()
    answers: tuple[str, ...] = ()
    """All that are accepted; none where the line gives none."""
    answer_type: str = "text"
    """One of ANSWER_TYPES; of a line that does not say, `choice` if it has choices, else `text`."""
    choices: tuple[str, ...] = ()
    """Options A, B, ... of a question with choices."""
    system: str | None = None
    """System message in place of the processor's."""
    source: str = ""
    split: str = ""
    is_raw: bool = False
    """Whether its text is the whole prompt, its placeholders included, and no template is applied."""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shown(self) -> list[ImageSource | VideoSource]:
        """All that it shows, in the order in which it stands in the prompt."""
        said = [part for asked, _ in self.history for part in asked] + list(self.parts)
        before = [*map(ImageSource, self.images), *self.videos]
        return before + [part for part in said if not isinstance(part, str)]

    @property
    def text(self) -> str:
        """All that it says."""
        return "".join(part for part in self.parts if isinstance(part, str))


class Prompts:
    """Random access to the prompts of `sources`. Every error names `file:line`."""

    def __init__(self, sources: Sequence[SourceConfig], processor: Processor, benchmark: str = ""):
        """Finds the lines of every file, which are in the format of `benchmark`, see `benchmarks`, if it is given.

        Raises ValueError for a file that cannot be read or is no JSONL.
        """
        for source in sources:
            if source.path.endswith(SUFFIX):
                raise ValueError(f"prompts are read from JSONL files, got {source.path}; give the file it was made of")
        self.processor = processor
        self.files = [Questions(source.path, benchmark) if benchmark else JsonLines(source.path) for source in sources]
        self.sources = sources
        self.stores = stores_of(sources, processor)

    @property
    def counts(self) -> list[int]:
        """Prompts of each file."""
        return [len(lines) for lines in self.files]

    def name(self, key: Key) -> str:
        """`file:line` of a prompt."""
        return self.files[key[0]].name(key[1])

    def __getitem__(self, key: Key) -> Prompt:
        """The prompt. Raises ValueError if its line is not of the expected form."""
        file, line = key
        return self.files[file].read(line, lambda name, fields: as_prompt(name, fields, str(line)))

    def sample(self, key: Key, rope_dhr: bool | None = None) -> Sample:
        """The prompt as model input, images and videos decoded; `rope_dhr` as in `Processor.prompt`.

        Raises ValueError for what cannot be shown.
        """
        return self.shown(key, rope_dhr)[0]

    def shown(self, key: Key, rope_dhr: bool | None = None) -> tuple[Sample, list[VideoSize]]:
        """`sample`, and what was taken of its videos."""
        prompt, processor, file = self[key], self.processor, self.sources[key[0]]
        reads, store, known = processor.tile.geometry, self.stores[key[0]], {}
        taken: list[VideoSize] = []

        def opened(source: ImageSource | VideoSource) -> Image.Image | Video:
            path = media.resolve(file.folder, source.path, file.follow_links)
            if isinstance(source, ImageSource):
                shown = images.open_image(path, processor.open_limit, processor.image)
                clip = store and image_clip(source.path, shown.size)
            else:
                shown, chosen = processor.open_video(
                    path, fps=source.fps, frames=source.frames, start=source.start, end=source.end
                )
                clip = store and video_clip(source.path, video.probe(path), chosen)
                taken.append(shown.size)
            if store:
                known[source] = store.read(clip, path, reads)
            return shown

        def message(parts: Sequence[str | ImageSource | VideoSource]) -> list[Any]:
            return [part if isinstance(part, str) else opened(part) for part in parts]

        with naming(prompt.name):
            pictures = [opened(ImageSource(path)) for path in prompt.images]
            videos = [opened(source) for source in prompt.videos]
            question, history = message(prompt.parts), [(message(asked), answer) for asked, answer in prompt.history]
            geometry = [known[source] for source in prompt.shown] if store else []
        if prompt.is_raw:
            sample = processor.raw_prompt(prompt.text, pictures, videos, rope_dhr=rope_dhr, name=prompt.name)
            return with_geometry(sample, geometry), taken
        if history:
            history[0] = processor.message(history[0][0], pictures, videos), history[0][1]
            pictures = videos = ()
        settings = {"rope_dhr": rope_dhr, "system": prompt.system, "name": prompt.name}
        sample = processor.prompt(question, pictures, history, videos=videos, **settings)
        return with_geometry(sample, geometry), taken


def as_prompt(name: str, fields: Any, number: str) -> Prompt:
    """A line that was parsed; `number` is its id if it has none. Raises ValueError if it has not the expected form."""
    check_object(fields)
    check_text(fields)
    unrolled = "prompt" not in fields and fields.keys() & {"messages", "conversations"}
    left = _unrolled(fields) if unrolled else dict(fields)

    def take(key: str, kind: type | tuple[type, ...], default: Any, rule: str) -> Any:
        value = left.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise ValueError(f"`{key}` must be {rule}, got {short(value)}")
        return value

    def texts(key: str) -> list[str]:
        values = take(key, list, [], "a list of texts")
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"`{key}` must be a list of texts, got {short(values)}")
        return values

    prompt = take("prompt", (str, list), None, f"a text or {_PARTS}")
    if prompt is None:
        known = next((key for key in ("question", "query", "instruction") if key in fields), None)
        hint = f"; `{known}` must be called so" if known else ""
        raise ValueError(f"`prompt` must be given; this line has the keys {', '.join(list(fields)[:12])}{hint}")
    is_raw = take("prompt_is_raw", bool, False, "true or false")
    if is_raw and not isinstance(prompt, str):
        raise ValueError(f"a `prompt` that `prompt_is_raw` must be a text, got {short(prompt)}")
    images = paths(left, "image")
    videos = [left.pop("video", None) or [], take("videos", list, [], "a list of paths or objects with `path`")]
    videos = [one for value in videos for one in (value if isinstance(value, list) else [value])]
    answer = take("answer", str, None, "a text")
    answers = dict.fromkeys(([] if answer is None else [answer]) + texts("answers"))
    choices = texts("choices")
    answer_type = take("answer_type", str, "choice" if choices else "text", "a text")
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"`answer_type` must be one of {', '.join(ANSWER_TYPES)}; got {answer_type!r}")
    history = left.pop(_HISTORY, ())
    read = Prompt(
        name=name,
        id=str(take("id", object, number, "anything")),
        parts=(prompt,) if isinstance(prompt, str) else tuple(map(_part, prompt)),
        history=history,
        images=images,
        videos=tuple(map(_video, videos)),
        answers=tuple(answers),
        answer_type=answer_type,
        choices=tuple(choices),
        system=take("system", str, None, "a text"),
        source=take("source", str, "", "a text"),
        split=take("split", str, "", "a text"),
        is_raw=is_raw,
        meta=left,
    )
    check_near([key for key, value in left.items() if value not in (None, "", [], {})], _NEAR)
    return read


_NEAR = {"options": "choices", "choice": "choices", "option": "choices", "answertype": "answer_type"}
_HISTORY = "_history"


def _unrolled(fields: dict[str, Any]) -> dict[str, Any]:
    """A line with the last question of its conversation as `prompt`, and what was said before as history."""
    about = {key: value for key, value in fields.items() if key not in _SAID}
    said = read_line(fields, tuple(about))
    turns = [turn["value"] for turn in said.conversations]
    speakers = [turn["from"] for turn in said.conversations]
    if speakers[0] == "system":
        speakers, about["system"] = speakers[1:], turns.pop(0)
    if speakers[-1:] == ["gpt"]:
        speakers, answer = speakers[:-1], turns.pop()
        if not (about.get("answer") or about.get("answers")):
            about["answer"] = answer
    if speakers != ["human", "gpt"] * (len(turns) // 2) + ["human"]:
        raise ValueError(
            f"turns must alternate user and assistant, a question last; got {', '.join(speakers) or 'none'}"
        )
    if any(isinstance(piece, chat.Control) for turn in turns[::2] for piece in chat.pieces(turn)):
        messages = chat.marked(turns, list(map(ImageSource, said.images)), list(map(VideoSource, said.videos)))
    else:
        messages = chat.marked(turns)
        about |= {"images": list(said.images), "videos": list(said.videos)}
    *before, asked = messages
    about[_HISTORY] = tuple((tuple(q), "".join(a)) for q, a in zip(before[::2], before[1::2], strict=True))
    return about | {"prompt": list(asked)}


_SAID = {"messages", "conversations", "system", "image", "images", "video", "videos"}


_PARTS = "a list of texts, {image: path} and {video: path, fps?, frames?, start?, end?}"


def _part(value: Any) -> str | ImageSource | VideoSource:
    if isinstance(value, str | ImageSource | VideoSource):
        return value
    if isinstance(value, dict) and value.keys() == {"image"} and isinstance(value["image"], str):
        return ImageSource(value["image"])
    if isinstance(value, dict) and "video" in value and "path" not in value:
        return _video({"path" if key == "video" else key: held for key, held in value.items()})
    raise ValueError(f"`prompt` must be a text or {_PARTS}, got {short(value)} in the list")


def _video(fields: Any) -> VideoSource:
    if isinstance(fields, str):
        return VideoSource(fields)
    rule = (
        "a video must be a path, or {path, fps?, frames?, start?, end?} with fps or frames, not both, and seconds from "
        f"0 on, got {short(fields)}"
    )
    if not isinstance(fields, dict) or not isinstance(fields.get("path"), str) or not fields.keys() <= _VIDEO_KEYS:
        raise ValueError(rule)
    fps, frames = fields.get("fps"), fields.get("frames")
    if fps is not None and (frames is not None or type(fps) not in (int, float) or not fps > 0):
        raise ValueError(rule)
    if frames is not None and (type(frames) is not int or frames < 1):
        raise ValueError(rule)
    start, end = fields.get("start") or 0.0, fields.get("end")
    if any(type(time) not in (int, float) for time in (start, 0 if end is None else end)):
        raise ValueError(rule)
    if not 0 <= start <= (math.inf if end is None else end):
        raise ValueError(rule)
    end = None if end is None else float(end)
    return VideoSource(fields["path"], None if fps is None else float(fps), frames, float(start), end)


_VIDEO_KEYS = {"path", "fps", "frames", "start", "end"}
