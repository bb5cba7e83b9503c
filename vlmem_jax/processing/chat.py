"""From a conversation to the text of a prompt: the chat template and the places of images in it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_MARKER = "<image>"
"""Stands in a conversation for an image."""
VIDEO_MARKER = "<video>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""Control tokens round the visual tokens of an image, and the placeholder of one visual token."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The control text of a chat format: every turn is `start` role newline text `end`."""

    start: str
    end: str
    user: str
    assistant: str
    system: str
    """Default text of the system turn."""

    @property
    def answer_start(self) -> str:
        """What stands before an answer."""
        return f"{self.start}{self.assistant}\n"

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return self.start, self.end, IMAGE_START, IMAGE_END, IMAGE_CONTEXT


TEMPLATES = {
    "internlm2-chat": Template(
        start="<|im_start|>",
        end="<|im_end|>",
        user="user",
        assistant="assistant",
        system="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
    )
}


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation whose turns alternate user, assistant, user, ...; images are marked `<image>` in user turns."""

    turns: tuple[str, ...]
    system: str | None = None

    @property
    def image_count(self) -> int:
        return sum(turn.count(IMAGE_MARKER) for turn in self.turns[::2])


def template(name: str) -> Template:
    """The template called `name`. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


def frame_lines(frames: int) -> str:
    """`Frame1:<image>` to `FrameN:<image>`, a line each: what stands for a video."""
    return "\n".join(f"Frame{index}:{IMAGE_MARKER}" for index in range(1, frames + 1))


def read_conversation(conversations: Any, images: int = 0, video: bool = False) -> Dialogue:
    """A training conversation, ready for the template: a list of {`from`: human | gpt, `value`: text} as JSON gives it.

    The first message may be from system. Texts are stripped. Where no turn marks the `images`, they stand before the
    first question; with `video` they are the frames of one video, marked `<video>`. A conversation that starts with
    gpt loses that turn. Raises ValueError for any other order, and for an empty answer.
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
    turns[0] = _place_images(turns, images, video)
    turns = [turn.strip() for turn in turns]
    if "" in turns[1::2]:
        raise ValueError(f"an answer must not be empty, but answer {turns[1::2].index('') + 1} is")
    if any(IMAGE_MARKER in turn for turn in turns[1::2]):
        raise ValueError(f"{IMAGE_MARKER} may stand in a question only, but an answer holds it")
    return _checked(Dialogue(tuple(turns), system), images)


def read_question(
    question: str, images: int = 0, history: Sequence[tuple[str, str]] = (), video: bool = False
) -> Dialogue:
    """A question after a `history` of (question, answer) pairs, ready for the template; texts stay as they are.

    Without history, images that the question does not mark stand before it.
    """
    turns = [text for pair in history for text in pair] + [question]
    if not history:
        turns[0] = _place_images(turns, images, video)
    return _checked(Dialogue(tuple(turns)), images)


def render(dialogue: Dialogue, chat: Template, system: str | None = None) -> str:
    """The prompt, with `<img><IMG_CONTEXT></img>` (one placeholder) for each image; open for an answer if none ends it.

    `system` replaces the template's system text; the dialogue's own comes first.
    """
    system = chat.system if system is None else system
    system = system if dialogue.system is None else dialogue.system
    parts = [f"{chat.start}system\n{system}{chat.end}"]
    for index, turn in enumerate(dialogue.turns):
        if index % 2 == 0:
            turn = turn.replace(IMAGE_MARKER, IMAGE_START + IMAGE_CONTEXT + IMAGE_END)
        parts.append(f"{chat.start}{chat.assistant if index % 2 else chat.user}\n{turn}{chat.end}")
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


def _place_images(turns: Sequence[str], images: int, video: bool) -> str:
    """The first turn with markers for images that no turn marks, and with frame lines for a video."""
    first = turns[0]
    if video:
        marker = IMAGE_MARKER if VIDEO_MARKER not in first and first.count(IMAGE_MARKER) == 1 else VIDEO_MARKER
        if marker not in first:
            first = f"{marker}\n{first}"
        return first.replace(marker, frame_lines(images), 1)
    if images and not any(IMAGE_MARKER in turn for turn in turns):
        return f"{IMAGE_MARKER}\n" * images + first
    return first


def _checked(dialogue: Dialogue, images: int) -> Dialogue:
    if dialogue.image_count != images:
        raise ValueError(f"the text holds {dialogue.image_count} {IMAGE_MARKER} but there are {images} images")
    return dialogue


def _around(text: str, token: str) -> str:
    place = text.index(token)
    return text[max(place - 20, 0) : place + len(token) + 20]
