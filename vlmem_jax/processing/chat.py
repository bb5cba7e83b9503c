"""From a conversation to the text of a prompt: the chat template and the places of images in it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_MARKER = "<image>"
"""Stands in a conversation for an image."""
VIDEO_MARKER = "<video>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""Control tokens round the visual tokens of an image, and the placeholder of one visual token."""
_MARKERS = re.compile(f"{IMAGE_MARKER}|{VIDEO_MARKER}")


@dataclasses.dataclass(frozen=True)
class Template:
    """The control text of a chat format: every turn is `start` role newline text `end`."""

    start: str
    end: str
    user: str
    assistant: str
    system: str
    """Default text of the system turn."""
    image: tuple[str, str, str] = (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)
    """Stands for an image: control tokens, the middle one for each visual token."""
    video: tuple[str, str, str] | None = None
    """The same for a video; None: its frames are images."""
    before_text: str = "\n"
    """Stands between an image that no turn marks and the first question."""
    after_turn: str = ""
    bos: bool = True
    """Whether a prompt begins with the tokenizer's start token."""
    stops: tuple[str, ...] = ()
    """Tokens that end an answer besides `end`."""

    @property
    def answer_start(self) -> str:
        """What stands before an answer."""
        return f"{self.start}{self.assistant}\n"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.start, self.end, *self.image, *(self.video or ()))))


TEMPLATES = {
    "internlm2-chat": Template(
        start="<|im_start|>",
        end="<|im_end|>",
        user="user",
        assistant="assistant",
        system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
    ),
    "qwen2-vl": Template(
        start="<|im_start|>",
        end="<|im_end|>",
        user="user",
        assistant="assistant",
        system="You are a helpful assistant.",
        image=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        video=("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        before_text="",
        after_turn="\n",
        bos=False,
        stops=("<|endoftext|>",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation whose turns alternate user, assistant, user, ...; user turns mark images and videos."""

    turns: tuple[str, ...]
    system: str | None = None

    @property
    def markers(self) -> list[str]:
        """IMAGE_MARKER and VIDEO_MARKER, as they follow each other."""
        return [marker for turn in self.turns[::2] for marker in _MARKERS.findall(turn)]


def template(name: str) -> Template:
    """The template called `name`. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


def with_frames(dialogue: Dialogue, frames: Sequence[int]) -> Dialogue:
    """`dialogue` with `Frame1:<image>` to `FrameN:<image>`, a line each, for each video of `frames` frames."""
    counts = iter(frames)

    def lines(_: re.Match) -> str:
        return "\n".join(f"Frame{index}:{IMAGE_MARKER}" for index in range(1, next(counts) + 1))

    turns = [turn if n % 2 else re.sub(VIDEO_MARKER, lines, turn) for n, turn in enumerate(dialogue.turns)]
    return dataclasses.replace(dialogue, turns=tuple(turns))


def read_conversation(conversations: Any, images: int = 0, videos: int = 0, before_text: str = "\n") -> Dialogue:
    """A training conversation, ready for the template: a list of {`from`: human | gpt, `value`: text} as JSON gives it.

    The first message may be from system. Texts are stripped. Where no turn marks the `images` (or `videos`), they stand
    before the first question, `before_text` after each; `<image>` may mark the only video, too. A conversation that
    starts with gpt loses that turn. Raises ValueError for any other order, and for an empty answer.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise ValueError(f"conversations must be a list of messages, got {repr(conversations)[:200]}")
    messages = [_message(index, entry) for index, entry in enumerate(conversations)]
    system = None
    if messages and messages[0][0] == "system":
        system = messages.pop(0)[1]
    if messages and messages[0][0] == "gpt":
        messages.pop(0)
    speakers = [speaker for speaker, _ in messages]
    if not messages or speakers != ["human", "gpt"] * (len(messages) // 2):
        raise ValueError(f"turns must alternate human, gpt and end with gpt; got {', '.join(speakers) or 'none'}")
    turns = [value for _, value in messages]
    turns[0] = _place(turns, images, videos, before_text)
    turns = [turn.strip() for turn in turns]
    if "" in turns[1::2]:
        raise ValueError(f"an answer must not be empty, but answer {turns[1::2].index('') + 1} is")
    if any(IMAGE_MARKER in turn for turn in turns[1::2]):
        raise ValueError(f"{IMAGE_MARKER} may stand in a question only, but an answer holds it")
    return _checked(Dialogue(tuple(turns), system), images, videos)


def read_question(
    question: str,
    images: int = 0,
    history: Sequence[tuple[str, str]] = (),
    videos: int = 0,
    before_text: str = "\n",
) -> Dialogue:
    """A question after a `history` of (question, answer) pairs, ready for the template; texts stay as they are.

    Without history, images and videos that the question does not mark stand before it.
    """
    turns = [text for pair in history for text in pair] + [question]
    if not history:
        turns[0] = _place(turns, images, videos, before_text)
    return _checked(Dialogue(tuple(turns)), images, videos)


def render(dialogue: Dialogue, chat: Template, system: str | None = None) -> str:
    """The prompt, with the template's tokens (one placeholder) for each image; open for an answer if none ends it.

    `system` replaces the template's system text; the dialogue's own comes first.
    """
    system = chat.system if system is None else system
    system = system if dialogue.system is None else dialogue.system
    parts = [f"{chat.start}system\n{system}{chat.end}{chat.after_turn}"]
    for index, turn in enumerate(dialogue.turns):
        if index % 2 == 0:
            turn = turn.replace(IMAGE_MARKER, "".join(chat.image))
            turn = turn.replace(VIDEO_MARKER, "".join(chat.video)) if chat.video else turn
        speaker = chat.assistant if index % 2 else chat.user
        parts.append(f"{chat.start}{speaker}\n{turn}{chat.end}{chat.after_turn}")
    if len(dialogue.turns) % 2:
        parts.append(chat.answer_start)
    return "".join(parts)


def check_text(dialogue: Dialogue, chat: Template) -> None:
    """Raises ValueError if a text holds a control token of the template: it would be taken for the real one."""
    for text in (*dialogue.turns, dialogue.system or ""):
        for token in chat.control_tokens:
            if token in text:
                raise ValueError(f"a text must not hold the control token {token}; got {_around(text, token)!r}")


def _message(index: int, entry: Any) -> tuple[str, str]:
    speaker, value = (entry.get("from"), entry.get("value")) if isinstance(entry, Mapping) else (None, None)
    allowed = ("system", "human", "gpt") if index == 0 else ("human", "gpt")
    if speaker not in allowed or not isinstance(value, str):
        raise ValueError(
            f"a message needs `from` ({' | '.join(allowed)}) and a text `value`, "
            f"but message {index + 1} is {repr(entry)[:200]}"
        )
    return speaker, value


def _place(turns: Sequence[str], images: int, videos: int, before_text: str) -> str:
    """The first turn with markers for images and videos that no turn marks."""
    first = turns[0]
    if videos and not any(VIDEO_MARKER in turn for turn in turns):
        if (images, videos) == (0, 1) and first.count(IMAGE_MARKER) == 1:
            first = first.replace(IMAGE_MARKER, VIDEO_MARKER)
        else:
            first = f"{VIDEO_MARKER}{before_text}" * videos + first
    if images and not any(IMAGE_MARKER in turn for turn in turns):
        first = f"{IMAGE_MARKER}{before_text}" * images + first
    return first


def _checked(dialogue: Dialogue, images: int, videos: int) -> Dialogue:
    markers = dialogue.markers
    for marker, count, what in ((IMAGE_MARKER, images, "images"), (VIDEO_MARKER, videos, "videos")):
        if markers.count(marker) != count:
            raise ValueError(f"the text holds {markers.count(marker)} {marker} but there are {count} {what}")
    return dialogue


def _around(text: str, token: str) -> str:
    place = text.index(token)
    return text[max(place - 20, 0) : place + len(token) + 20]
