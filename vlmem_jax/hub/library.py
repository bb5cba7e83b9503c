"""What Hugging Face's transformers makes of the small files of a checkpoint; it is imported when it is first asked.

It reads old forms of tokenizers, and says whether others will read a config and a chat template as they are meant. None
of its class defaults is used here.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmem_jax.checkpoint.folder import CONFIG_FILE
from vlmem_jax.paths import AnyPath, read_json
from vlmem_jax.processing import chat

SHOWN = 60
"""Characters of two texts that differ, from shortly before the first that does."""


def tokenizer_json(files: Mapping[str, bytes], folder: AnyPath) -> bytes:
    """The tokenizer.json of a tokenizer whose `files`, of `folder`, are vocab.json, merges.txt and settings alone.

    Raises ValueError where they do not make one.
    """
    _speak_of_errors_alone()
    from transformers import AutoTokenizer

    try:
        about = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
        kind = json.dumps({"model_type": about.get("model_type")}).encode()  # the rest would be read and judged, too
        with tempfile.TemporaryDirectory() as apart:
            for name, content in {**files, CONFIG_FILE: kind}.items():
                (Path(apart) / name).write_bytes(content)
            tokenizer = AutoTokenizer.from_pretrained(apart, trust_remote_code=False, local_files_only=True)
        return tokenizer.backend_tokenizer.to_str().encode()
    except Exception as error:  # of many kinds, by what the files hold
        raise ValueError(
            f"{folder} has its tokenizer as vocab.json and merges.txt alone, which make no tokenizer.json (does "
            f"tokenizer_config.json name a tokenizer_class?): {_line(error)}"
        ) from error


def misread(content: Mapping[str, Any]) -> list[str]:
    """A line for each key of a config.json that its class reads as something else, or one that it refuses it all; none
    where it reads all as it is, or has no class for this model."""
    _speak_of_errors_alone()
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING_NAMES:
        return []
    try:
        read = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(content))).to_dict()
    except Exception as error:  # its checks raise errors of many kinds
        return [f"transformers refuses this config.json: {_line(error)}"]
    theirs = _flat(read)
    return [
        f"transformers reads {key} of config.json as {theirs[key]!r}, and it is {value!r}"
        for key, value in _flat(content).items()
        if key in theirs and not key.endswith(("model_type", "architectures")) and _plain(value) != _plain(theirs[key])
    ]


def template_differs(folder: AnyPath, ours: chat.Template) -> str | None:
    """How the chat template that lies in `folder` writes a dialogue otherwise than ours; None where it does not, or
    there is none."""
    theirs = _template(folder)
    if theirs is None:
        return None
    settings = _settings(folder)
    tokens = {key: _text(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    start = tokens["bos_token"] if ours.bos else ""
    _speak_of_errors_alone()
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, system, messages in _dialogues("image" in theirs):
        said = [*([{"role": "system", "content": system}] if system else []), *map(_as_theirs, messages)]
        turns = tuple(tuple(content) for _, content in messages)
        meant = start + "".join(chat.render(chat.Dialogue(turns, system), ours))
        try:
            [written], _ = render_jinja_template([said], chat_template=theirs, add_generation_prompt=True, **tokens)
        except Exception as error:  # whatever a template may do wrong
            return f"the chat template in {folder} cannot write {name}: {_line(error)}"
        if written != meant:
            at = max(len(os.path.commonprefix([written, meant])) - SHOWN // 3, 0)
            return (
                f"the chat template in {folder} writes {name} otherwise than is done here: "
                f"{written[at : at + SHOWN]!r}, and here {meant[at : at + SHOWN]!r}"
            )
    return None


_IMAGE = object()


def _dialogues(images: bool) -> Iterator[tuple[str, str | None, list[tuple[str, list[Any]]]]]:
    """Name, system text and messages (role, parts) of the dialogues that templates are compared by."""
    yield "a question", None, [("user", ["Which one?"])]
    several = [("user", ["Which one?"]), ("assistant", ["The red one."]), ("user", ["Why?"])]
    yield "several turns with a system text", "Be brief.", several
    if images:
        yield "a question about an image", None, [("user", [_IMAGE, "Which one?"])]


def _as_theirs(message: tuple[str, list[Any]]) -> dict[str, Any]:
    role, parts = message
    if all(isinstance(part, str) for part in parts):
        return {"role": role, "content": "".join(parts)}
    kinds = [{"type": "image"} if part is _IMAGE else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": kinds}


def _template(folder: AnyPath) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    alone = read_json(folder / "chat_template.json") if (folder / "chat_template.json").is_file() else {}
    found = alone.get("chat_template", _settings(folder).get("chat_template"))
    if isinstance(found, list):  # several, by name
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, Mapping)}.get("default")
    return found if isinstance(found, str) else None


def _settings(folder: AnyPath) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


def _text(token: Any) -> str:
    """A token as tokenizer_config.json has it: a text, an object with `content`, or null."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by key. Those of the text, of its rotary positions too, stand in sections or at the top."""
    found = {}
    for key, value in content.items():
        at_top = key in ("text_config", "rope_scaling", "rope_parameters")
        if isinstance(value, Mapping):
            found |= _flat(value, prefix if at_top else f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _plain(value: Any) -> str:
    """As JSON, in which 2 and 2.0 are one number."""
    return json.dumps(float(value) if isinstance(value, int) else value, default=str)


def _speak_of_errors_alone() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported; it misses a torch otherwise


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
