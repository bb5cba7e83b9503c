"""Text to ids and back, from a folder with `tokenizer.json` or a sentencepiece `tokenizer.model`.

Only data files are read; code that a checkpoint brings along is never run.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import SupportsIndex

import sentencepiece
import tokenizers

from vlmem_jax.paths import AnyPath, as_path

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")
_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""How a special token is described in tokenizer.json and tokenizer_config.json."""

Files = Mapping[str, bytes]
"""Content of the files of a tokenizer, by name."""


class Tokenizer:
    """Encodes and decodes text. Safe to share between threads."""

    def __init__(
        self, files: Files, backend: "_FastTokenizer | _SentencePiece", folder: AnyPath, special: Iterable[str] = ()
    ):
        """`special`: tokens that `text_encoder` takes for text, besides those that start, end and pad."""
        self._backend, self.folder = backend, folder
        content = b"".join(part for name in _FILES if name in files for part in (name.encode(), files[name]))
        self._digest = hashlib.sha256(content).hexdigest()[:32]
        settings = _settings(files, folder)
        self.bos_id = backend.id(settings.get("bos_token") or "<s>")
        """Start token; None if there is none."""
        self.pad_id = self.id(settings.get("pad_token") or settings.get("eos_token") or "</s>")
        ends = ("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "</s>")
        self._literal = {*special, *(settings.get(key) or default for key, default in ends)}
        self._special = tuple(special)
        self.vocab_size: int = backend.vocab_size
        """Ids are smaller than this."""
        self.unused: tuple[int, ...] = backend.unused
        """Ids below it that stand for no token."""

    @classmethod
    def load(cls, folder: str | os.PathLike, special: Mapping[str, int] = {}) -> "Tokenizer":
        """From `tokenizer.json`, else `tokenizer.model` with `added_tokens.json` and `tokenizer_config.json` beside it.

        `special`: ids of special tokens that are there in any case. Raises ValueError naming the folder or file that
        does not fit.
        """
        folder = as_path(folder)
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        return cls.read(files, folder, special)

    @classmethod
    def read(
        cls, files: Mapping[str, bytes], folder: str | os.PathLike, special: Mapping[str, int] = {}
    ) -> "Tokenizer":
        """As `load`, from the content of the files of `folder`."""
        return cls(*_with_special(files, special, folder), folder, special)

    def digest(self) -> str:
        """Of the files that ids depend on: another tokenizer, another text."""
        return self._digest

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which special tokens are recognised; no start token is added."""
        return self._backend.encode(text)

    def text_encoder(self, control: Iterable[str]) -> Callable[[str], list[int]]:
        """A function like `encode` for text that anyone may have written: no part of it becomes a `control` token.

        Nor one that starts, ends, pads or is a memory's; such tokens are text there. Others (`<ref>`, say) are
        recognised. The function raises ValueError where the vocabulary has a word for the id of a control token.
        """
        control = (*control, *self._special)
        encode = self._backend.text_encoder(self._literal.union(control))
        taken = {self._backend.id(token): token for token in control}

        def encode_text(text: str) -> list[int]:
            ids = encode(text)
            if found := taken.keys() & set(ids):
                raise ValueError(
                    f"a text must hold nothing that the tokenizer in {self.folder} reads as the control token "
                    f"{taken[min(found)]}, got {text!r:.200}"
                )
            return ids

        return encode_text

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Text of `ids`; special tokens are left out or written as they are. Bytes of no character become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special)

    def id(self, token: str) -> int:
        """Id of a token. Raises ValueError if the vocabulary lacks it."""
        found = self._backend.id(token)
        if found is None:
            raise ValueError(
                f"the tokenizer in {self.folder} has no token {token!r}; add it there, or, if it is the start or pad "
                "token, name the right one in tokenizer_config.json (bos_token, pad_token)"
            )
        return found

    def stream(self) -> "TextStream":
        """A decoder for ids that come one at a time."""
        return TextStream(self)


class TextStream:
    """Decodes ids as they come: `push` returns the new text, never half a character; `flush` what is left."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last shown stretch and what came after it
        self._shown = 0

    def push(self, token: int) -> str:
        """Text that `token` completes, perhaps empty."""
        self._ids.append(int(token))
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._take(text)

    def flush(self) -> str:
        """Text held back at the end; a broken character shows as U+FFFD."""
        return self._take(self._new_text())

    def _new_text(self) -> str:
        # decoding from the last shown stretch keeps the spaces that depend on a neighbour
        shown = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]

    def _take(self, text: str) -> str:
        if text:
            self._ids = self._ids[self._shown :]
            self._shown = len(self._ids)
        return text


class _FastTokenizer:
    def __init__(self, content: bytes, path: AnyPath):
        try:
            self._tokenizer = _read(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        self._content = content
        self.vocab_size, self.unused = _count(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        return _encode(self._tokenizer, text)

    def text_encoder(self, literal: Collection[str]) -> Callable[[str], list[int]]:
        content = json.loads(self._content)
        for token in content.get("added_tokens", []):
            token["special"] = token["content"] in literal
        tokenizer = _read(json.dumps(content).encode())
        tokenizer.encode_special_tokens = True  # as the text that they are
        return functools.partial(_encode, tokenizer)

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def text(self, token: int) -> str | None:
        return self._tokenizer.id_to_token(token)


def _read(content: bytes) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    # of a batch, since `encode` keeps the interpreter lock while it works: threads would tokenise one at a time
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


class _SentencePiece:
    """sentencepiece knows nothing of added tokens: text is split at them first, pieces between are encoded alone."""

    def __init__(self, files: Files, folder: AnyPath):
        path = folder / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(files[path.name])
        except Exception as error:  # RuntimeError or OSError, by the kind of damage
            raise ValueError(f"{path} is no sentencepiece model: {error}") from error
        size = self._model.get_piece_size()
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        added = _added_tokens(files, folder)
        self._special = control | added
        self._text_of = {i: token for token, i in control.items()} | {i: token for token, i in added.items()}
        self.vocab_size, self.unused = _count([*range(size), *self._special.values()])
        self.encode = self.text_encoder(())

    def text_encoder(self, literal: Collection[str]) -> Callable[[str], list[int]]:
        special = {token: i for token, i in self._special.items() if token not in literal}
        longest_first = sorted(special, key=len, reverse=True)
        split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

        def encode(text: str) -> list[int]:
            ids = []
            for part in split.split(text):
                if part in special:
                    ids.append(special[part])
                elif part:
                    ids.extend(self._model.encode(part))
            return ids

        return encode

    def decode(self, ids: list[int], skip_special: bool) -> str:
        text, run = [], []
        for i in ids:
            if i not in self._text_of:
                run.append(i)
            elif not skip_special:
                text += self._model.decode(run), self._text_of[i]
                run = []
        text.append(self._model.decode(run))
        return "".join(text)

    def id(self, token: str) -> int | None:
        if token in self._special:
            return self._special[token]
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def text(self, token: int) -> str | None:
        if token in self._text_of:
            return self._text_of[token]
        return self._model.id_to_piece(token) if token < self._model.get_piece_size() else None


def with_special(files: Files, tokens: Mapping[str, int], folder: AnyPath) -> dict[str, bytes]:
    """The files of the tokenizer in `folder`, in which `tokens` are special tokens with these ids; as they are if so.

    Raises ValueError where a token or an id is in use otherwise.
    """
    return _with_special(files, tokens, folder)[0]


def _with_special(
    files: Files, tokens: Mapping[str, int], folder: AnyPath
) -> tuple[dict[str, bytes], _FastTokenizer | _SentencePiece]:
    files, backend = dict(files), _backend(files, folder)
    missing = {token: i for token, i in tokens.items() if not _is_special(backend, token, i)}
    for token, i in missing.items():
        found, other = backend.id(token), backend.text(i)
        if found not in (None, i) or other not in (None, token):
            there = f"that id is {other!r}" if found in (None, i) else f"it has {found}"
            raise ValueError(
                f"the token {token} must have the id {i}, but in the tokenizer in {folder} {there}; set the key "
                "token_ids of the model's memory to the ids that its tokens have, or to some that are free"
            )
    if not missing:
        return files, backend
    files["added_tokens.json"] = _json(_read_json(files, "added_tokens.json", folder) | missing)
    settings = _read_json(files, "tokenizer_config.json", folder)
    if settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] |= {str(i): {"content": token, **_SPECIAL} for token, i in missing.items()}
        files["tokenizer_config.json"] = _json(settings)
    if "tokenizer.json" in files:
        content = json.loads(files["tokenizer.json"])
        entries = [{"id": i, "content": token, **_SPECIAL} for token, i in missing.items()]
        entries += [entry for entry in content.get("added_tokens", []) if entry["content"] not in missing]
        content["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
        files["tokenizer.json"] = _json(content)
        backend = _backend(files, folder)
        if any(backend.id(token) != i for token, i in missing.items()) and isinstance(content["model"]["vocab"], dict):
            # the library numbers added tokens one after the other, but for those that the vocabulary numbers
            content["model"]["vocab"] |= {entry["content"]: entry["id"] for entry in content["added_tokens"]}
            files["tokenizer.json"] = _json(content)
    backend = _backend(files, folder)
    if wrong := [token for token, i in missing.items() if not _is_special(backend, token, i)]:
        raise ValueError(
            f"the tokenizer in {folder} cannot hold the token {wrong[0]} with the id {tokens[wrong[0]]}; set the key "
            "token_ids of the model's memory to the ids that follow its last one"
        )
    return files, backend


def _backend(files: Files, folder: AnyPath) -> _FastTokenizer | _SentencePiece:
    if "tokenizer.json" in files:
        return _FastTokenizer(files["tokenizer.json"], folder / "tokenizer.json")
    if "tokenizer.model" in files:
        return _SentencePiece(files, folder)
    raise ValueError(f"a tokenizer folder needs tokenizer.json or tokenizer.model, but {folder} has neither")


def _is_special(backend: _FastTokenizer | _SentencePiece, token: str, i: int) -> bool:
    """Whether `token` has this id wherever it stands in a text, and is no text itself."""
    return backend.id(token) == i and backend.encode(f"a{token}a").count(i) == 1 and not backend.decode([i], True)


def _count(ids: Iterable[int]) -> tuple[int, tuple[int, ...]]:
    """The number after the last id, and which numbers below it are none."""
    ids = set(ids)
    return max(ids) + 1, tuple(sorted(set(range(max(ids))) - ids))


def _settings(files: Files, folder: AnyPath) -> dict:
    """`tokenizer_config.json`, with token entries given as objects reduced to their text; {} if there is none."""
    settings = _read_json(files, "tokenizer_config.json", folder)
    return {key: value.get("content", value) if isinstance(value, dict) else value for key, value in settings.items()}


def _added_tokens(files: Files, folder: AnyPath) -> dict[str, int]:
    decoder = _read_json(files, "tokenizer_config.json", folder).get("added_tokens_decoder") or {}
    return _read_json(files, "added_tokens.json", folder) | {entry["content"]: int(i) for i, entry in decoder.items()}


def _read_json(files: Files, name: str, folder: AnyPath) -> dict:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{folder / name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got a {type(content).__name__}")
    return content


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
