"""A line of data as people write it, and the conversation that it means.

Read are `conversations` ({from, value}, as LLaVA and ShareGPT have them) and `messages` ({role, content}, as OpenAI and
TRL have them, the content a text or a list of parts), with `image` or `images`, `video` or `videos`, and `system`.
A message with `loss: false` or `weight: 0` is not learned. In a text `<image>` and `<video>` are markers, in a part of
type text they are not.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SPEAKERS = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user", "prompter"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "gpt"),
}
"""Who speaks, by the names that are in use."""
_MEDIA = re.compile(
    r"(?:image|img|picture|photo)s?([_-]?(?:path|file|url|uri|src)s?)?|(?:video|vid)s?([_-]?(?:path|file|url|uri|src)s?)?"
)
LONGEST = 120
"""Characters of a user's data that a message shows."""


class Said(NamedTuple):
    """A line, as far as its conversation goes."""

    conversations: list[dict[str, Any]]
    """Messages as `chat.read_conversation` takes them."""
    images: tuple[str, ...]
    videos: tuple[str, ...]
    ignored: tuple[str, ...]
    """Keys of the line that mean nothing here."""


def short(value: Any) -> str:
    """A value as a message shows it, cut if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def read_line(fields: Any, known: Sequence[str] = ()) -> Said:
    """What a line that was parsed says, in any of the forms; `known`: keys that the caller reads besides.

    Raises ValueError if it has not one of the forms, and for a key that is nearly one of them.
    """
    check_object(fields)
    check_text(fields)
    left = {key: value for key, value in fields.items() if key not in known}
    form = next((key for key in ("conversations", "messages") if left.get(key) is not None), None)
    if form is None:
        raise ValueError(f"`conversations` or `messages` must be a list of messages; {_keys_of(fields)}")
    messages = left.pop(form)
    if not isinstance(messages, list):
        raise ValueError(f"`{form}` must be a list of messages, got {short(messages)}")
    if not messages:
        raise ValueError(f"`{form}` is empty")
    images, videos = (paths(left, kind) for kind in ("image", "video"))
    system = left.pop("system", None)
    if not isinstance(system, str | None):
        raise ValueError(f"`system` must be a text, got {short(system)}")
    entries, shown = [], {"image": [], "video": []}
    for index, message in enumerate(messages):
        entries.append(_message(index, message, shown))
    if system is not None and entries[0]["from"] != "system":
        entries.insert(0, {"from": "system", "value": system})
    for kind, given in (("image", images), ("video", videos)):
        if shown[kind] and given:
            raise ValueError(f"the paths of {kind}s stand in the parts of messages or in `{kind}s`, this line has both")
    ignored = tuple(key for key, value in left.items() if value not in (None, "", [], {}))
    check_near(ignored)
    return Said(entries, images or tuple(shown["image"]), videos or tuple(shown["video"]), ignored)


def check_object(fields: Any) -> None:
    """Raises ValueError for a line that is no object."""
    if not isinstance(fields, dict):
        raise ValueError(f"a line must be a JSON object, got {type(fields).__name__}")


def check_text(value: Any) -> None:
    """Raises ValueError for half of a surrogate pair in any text of a line: no encoding has it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            around = value[max(error.start - 20, 0) : error.start]
            raise ValueError(
                f"a text must be Unicode, but holds half of a surrogate pair, {value[error.start]!a}, after {around!r}"
            ) from None
    elif isinstance(value, Mapping):
        for one in value.items():
            check_text(one)
    elif isinstance(value, list | tuple):
        for one in value:
            check_text(one)


def check_near(keys: Sequence[str], near: Mapping[str, str] = {}) -> None:
    """Raises ValueError for a key that is nearly one that is read, which would leave out what it shows."""
    for key in keys:
        if (meant := near.get(key.lower())) is None and (found := _MEDIA.fullmatch(key.lower())):
            meant = "video" if found[0].startswith("vid") else "image"
        if meant is not None:
            raise ValueError(f"there is no key `{key}`; it must be called `{meant}`")


def paths(fields: dict[str, Any], kind: str) -> tuple[str, ...]:
    """Takes `image` and `images` (or video) out of a line: a path, a list of them, or of {path: ...}."""
    found = []
    for key in (kind, f"{kind}s"):
        value = fields.pop(key, None) or []
        for one in [value] if isinstance(value, str | dict) else value if isinstance(value, list) else [value]:
            if isinstance(one, dict) and isinstance(one.get("path"), str) and not one.get("bytes"):
                one = one["path"]
            if isinstance(one, dict) and one.get("bytes"):
                raise ValueError(f"`{key}` holds a file itself; `vlmem data convert` writes it beside the line")
            if not isinstance(one, str):
                raise ValueError(f"`{key}` must be a path or a list of paths, got {short(value)}")
            found.append(one)
    return tuple(found)


def _message(index: int, message: Any, shown: dict[str, list[str]]) -> dict[str, Any]:
    keys = ("from", "value") if isinstance(message, dict) and "from" in message else ("role", "content")
    if not isinstance(message, dict) or not isinstance(message.get(keys[0]), str):
        raise ValueError(
            f"a message needs {{from, value}} or {{role, content}}, but message {index + 1} is {short(message)}"
        )
    speaker, value = SPEAKERS.get(message[keys[0]].lower()), message.get(keys[1])
    if speaker is None or (speaker == "system" and index):
        raise ValueError(
            f"`{keys[0]}` must be system (of the first message), human or user, gpt or assistant, but message "
            f"{index + 1} is from {short(message[keys[0]])}"
        )
    entry: dict[str, Any] = {"from": speaker, "value": _value(index, value, speaker, shown)}
    if message.get("loss") is False or message.get("weight") == 0:
        entry["loss"] = False
    return entry


def _value(index: int, value: Any, speaker: str, shown: dict[str, list[str]]) -> Any:
    """A text, or a list of texts and {"type": image | video}."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"what message {index + 1} says must be a text or a list of parts, got {short(value)}")
    parts = [_part(index, part, shown) for part in value]
    if speaker != "human":
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(f"only the user may show images and videos, but message {index + 1} is from {speaker}")
        return "".join(parts)
    return parts


def _part(index: int, part: Any, shown: dict[str, list[str]]) -> Any:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    for what in ("image", "video"):
        if kind in (what, f"{what}_url"):
            path = next((part[key] for key in (what, f"{what}_url", "path", "url") if part.get(key)), None)
            if isinstance(path, dict):
                path = path.get("url") or path.get("path")
            if path is not None:
                if not isinstance(path, str):
                    raise ValueError(f"a part of message {index + 1} must name a file, got {short(part)}")
                shown[what].append(path)
            return {"type": what}
    raise ValueError(f"a part of message {index + 1} must be of type text, image or video, got {short(part)}")


def _keys_of(fields: Mapping[str, Any]) -> str:
    keys = ", ".join(list(map(str, fields))[:12])
    if {"instruction", "output"} <= fields.keys():
        return f"this line has {keys}: `vlmem data convert` makes conversations of them"
    return f"this line has the keys {keys}" if keys else "this line is empty"
