"""From a conversation to the pieces of a prompt: the chat template and the places of images in it."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmem_jax.processing.video import Video, VideoSize

IMAGE_MARKER = "<image>"
"""Stands in the text of a training conversation for an image; in any other text it is text."""
VIDEO_MARKER = "<video>"
IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""Control tokens round the visual tokens of an image, and the placeholder of one visual token."""
FRAME = "<|video_frame|>"
"""The placeholder of one visual token of a frame, where the tokenizer came with none."""
_MARKERS = re.compile(f"({IMAGE_MARKER}|{VIDEO_MARKER})")
_MARKER_OF = {"image": IMAGE_MARKER, "video": VIDEO_MARKER}

Part = Any
"""Of a message: a text, or what it shows, an image or a `Video` (or their sizes, to plan with)."""
Message = Sequence[Part]
"""What one speaker says and shows, in order. Its texts are never searched for markers or control tokens."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The control text of a chat format: every turn is `start` role newline text `end`."""

    start: str
    end: str
    user: str
    assistant: str
    system: str | None
    """Default text of the system turn; None: there is none unless one is given."""
    image: tuple[str, str, str] = (IMAGE_START, IMAGE_CONTEXT, IMAGE_END)
    """Stands for an image: control tokens, the middle one for each visual token; those beside it may be empty."""
    video: tuple[str, str, str] | None = None
    """The same for a video; None: its frames are images."""
    before_text: str = "\n"
    """Stands between an image that no turn marks and the first question."""
    after_turn: str = ""
    bos: bool = True
    """Whether a prompt begins with the tokenizer's start token."""
    stops: tuple[str, ...] = ()
    """Tokens that end an answer besides `end`."""
    learned: tuple[str, ...] = ()
    """Control tokens, and texts of one token, that are learned wherever they stand, and with them the opening of each
    answer (LLaVA-NeXT). None: answers alone are learned, and the token that ends them."""

    @property
    def answer_start(self) -> list[str]:
        """What stands before an answer, in pieces."""
        return [Control(self.start), f"{self.assistant}\n"]

    def turn(self, speaker: str, parts: Message) -> list[str]:
        """The pieces of a whole turn."""
        said = [piece for part in parts for piece in ([part] if isinstance(part, str) else self._shown(part))]
        return [Control(self.start), f"{speaker}\n", *said, Control(self.end), self.after_turn]

    def _shown(self, part: Part) -> list[str]:
        tokens = self.video if isinstance(part, Video | VideoSize) and self.video else self.image
        return [Control(token) for token in tokens if token]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        shown = (token for token in (*self.image, *(self.video or ())) if token)
        return tuple(dict.fromkeys((self.start, self.end, *shown)))


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
    "qwen-vl-steps": Template(
        start="<|im_start|>",
        end="<|im_end|>",
        user="user",
        assistant="assistant",
        system=None,
        image=("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
        video=("<|vision_start|>", "<|video_pad|>", "<|vision_end|>"),
        before_text="",
        after_turn="\n",
        bos=False,
        stops=("<|endoftext|>",),
    ),
    "llava-video": Template(
        start="<|im_start|>",
        end="<|im_end|>",
        user="user",
        assistant="assistant",
        system="You are a helpful assistant.",
        image=("", FRAME, ""),
        before_text="\n",
        after_turn="\n",
        bos=False,
        stops=("<|endoftext|>",),
        learned=("<|im_start|>", "<|im_end|>", "\n"),
    ),
}


class Control(str):
    """A control token of a template; a text that reads the same is no such thing."""


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Messages that alternate user, assistant, user, ...; those of the assistant are texts."""

    messages: tuple[Message, ...]
    system: str | None = None
    learned: tuple[bool, ...] = ()
    """Whether each answer is, in training; where it is not said, all are."""

    @property
    def shown(self) -> list[Any]:
        """All images and videos, in order."""
        return [part for message in self.messages for part in message if not isinstance(part, str)]


def template(name: str) -> Template:
    """The template called `name`. Raises ValueError with the names there are."""
    if name not in TEMPLATES:
        raise ValueError(f"template must be one of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


def message(text: str | Message, images: Sequence[Any] = (), videos: Sequence[Any] = (), after: str = "") -> Message:
    """The parts of a message that shows images and videos before its text, `after` behind each."""
    gap = (after,) if after else ()
    shown = [part for one in (*images, *videos) for part in (one, *gap)]
    return (*shown, *([text] if isinstance(text, str) else text))


def read_conversation(
    conversations: Any, images: Sequence[Any] = (), videos: Sequence[Any] = (), before_text: str = "\n"
) -> Dialogue:
    """A training conversation, ready for the template: a list of {`from`: human | gpt, `value`: text} as JSON gives it.

    The first message may be from system, and one with `loss: false` is not learned. Texts are stripped. `<image>` and
    `<video>` in a question mark where `images` and `videos` stand; where no turn marks them, that is before the first
    question, `before_text` after each; `<image>` may mark the only video, too. A `value` may also be a list of texts,
    which are not searched, and {`type`: image | video}. A conversation that starts with gpt loses that turn. Raises
    ValueError for any other order, for an empty answer, and where markers and what is shown differ in number.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise ValueError(f"conversations must be a list of messages, got {repr(conversations)[:200]}")
    entries = [_entry(index, entry) for index, entry in enumerate(conversations)]
    system = None
    if entries and entries[0][0] == "system":
        system = entries.pop(0)[1]
    if entries and entries[0][0] == "gpt":
        entries.pop(0)
    speakers = [speaker for speaker, *_ in entries]
    if not entries or speakers != ["human", "gpt"] * (len(entries) // 2):
        raise ValueError(f"turns must alternate human, gpt and end with gpt; got {', '.join(speakers) or 'none'}")
    turns = [value for _, value, _ in entries]
    turns[0] = _place(turns, len(images), len(videos), before_text)
    turns = [turn.strip() if isinstance(turn, str) else turn for turn in turns]
    if "" in turns[1::2]:
        raise ValueError(f"an answer must not be empty, but answer {turns[1::2].index('') + 1} is")
    if any(IMAGE_MARKER in turn for turn in turns[1::2]):
        raise ValueError(f"{IMAGE_MARKER} may stand in a question only, but an answer holds it")
    return Dialogue(marked(turns, images, videos), system, tuple(learned for *_, learned in entries[1::2]))


def marked(
    turns: Sequence[str | Sequence[Any]], images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> tuple[Message, ...]:
    """Turns as messages, in whose questions (the first turn, the third, ...) `<image>` and `<video>` are markers.

    Only formats that define the markers are read like this. Raises ValueError where their numbers are not those of
    `images` and `videos`.
    """
    said = [[turn] if n % 2 else pieces(turn) for n, turn in enumerate(turns)]
    for marker, shown, what in ((IMAGE_MARKER, images, "images"), (VIDEO_MARKER, videos, "videos")):
        count = sum(isinstance(piece, Control) and piece == marker for one in said for piece in one)
        if count != len(shown):
            raise ValueError(f"the text holds {count} {marker} but there are {len(shown)} {what}")
    left = {IMAGE_MARKER: iter(images), VIDEO_MARKER: iter(videos)}
    return tuple(tuple(next(left[part]) if isinstance(part, Control) else part for part in one) for one in said)


def pieces(turn: str | Sequence[Any]) -> list[str]:
    """The texts of a turn, and its markers as `Control`."""
    if isinstance(turn, str):
        return [Control(piece) if n % 2 else piece for n, piece in enumerate(_MARKERS.split(turn))]
    return [part if isinstance(part, str) else Control(_MARKER_OF[part["type"]]) for part in turn]


def render(dialogue: Dialogue, chat: Template, system: str | None = None) -> list[str]:
    """The pieces of the prompt: texts, and the template's tokens as `Control`, one placeholder for what is shown.

    It is open for an answer if none ends it. `system` replaces the template's system text; the dialogue's own comes
    first.
    """
    system = chat.system if system is None else system
    system = system if dialogue.system is None else dialogue.system
    pieces = [] if system is None else chat.turn("system", (system,))
    for index, parts in enumerate(dialogue.messages):
        pieces += chat.turn(chat.assistant if index % 2 else chat.user, parts)
    return pieces + chat.answer_start if len(dialogue.messages) % 2 else pieces


def check_text(text: str, chat: Template) -> None:
    """Raises ValueError if a text to be learned holds a control token of the template: it was rendered already."""
    for token in chat.control_tokens:
        if token in text:
            raise ValueError(f"a text must not hold the control token {token}; got {_around(text, token)!r}")


def _entry(index: int, entry: Any) -> tuple[str, str | list[Any], bool]:
    speaker, value = (entry.get("from"), entry.get("value")) if isinstance(entry, Mapping) else (None, None)
    allowed = ("system", "human", "gpt") if index == 0 else ("human", "gpt")
    if speaker == "human" and isinstance(value, list) and all(map(_is_part, value)):
        return speaker, value, True
    if speaker not in allowed or not isinstance(value, str):
        raise ValueError(
            f"a message needs `from` ({' | '.join(allowed)}) and a text `value`, "
            f"but message {index + 1} is {repr(entry)[:200]}"
        )
    return speaker, value, entry.get("loss", True)


def _is_part(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and part.get("type") in _MARKER_OF)


def _place(turns: Sequence[str | list[Any]], images: int, videos: int, before_text: str) -> str | list[Any]:
    """The first turn with markers for images and videos that no turn marks."""
    first = turns[0]

    def marks(turn: str | list[Any], kind: str) -> bool:
        return _MARKER_OF[kind] in turn if isinstance(turn, str) else {"type": kind} in turn

    def before(kind: str, count: int) -> str | list[Any]:
        if isinstance(first, str):
            return f"{_MARKER_OF[kind]}{before_text}" * count + first
        return [{"type": kind}, *([before_text] if before_text else [])] * count + first

    if videos and not any(marks(turn, "video") for turn in turns):
        if (images, videos) == (0, 1) and isinstance(first, str) and first.count(IMAGE_MARKER) == 1:
            first = first.replace(IMAGE_MARKER, VIDEO_MARKER)
        else:
            first = before("video", videos)
    if images and not any(marks(turn, "image") for turn in turns):
        first = before("image", images)
    return first


def _around(text: str, token: str) -> str:
    place = text.index(token)
    return text[max(place - 20, 0) : place + len(token) + 20]
