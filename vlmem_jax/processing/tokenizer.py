"""Text to ids and back, from a folder with `tokenizer.json` or a sentencepiece `tokenizer.model`.

Only data files are read; code that a checkpoint brings along is never run.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import SupportsIndex

import sentencepiece
import tokenizers

from vlmem_jax.paths import AnyPath, as_path

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json")


class Tokenizer:
    """Encodes and decodes text; special tokens are recognised in it. Safe to share between threads."""

    def __init__(self, backend: "_FastTokenizer | _SentencePiece", folder: AnyPath, settings: dict):
        self._backend = backend
        self.folder = folder
        self.bos_id = backend.id(settings.get("bos_token") or "<s>")
        """Start token; None if there is none."""
        self.pad_id = self.id(settings.get("pad_token") or settings.get("eos_token") or "</s>")
        self.vocab_size: int = backend.vocab_size
        """Ids are smaller than this."""

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """From `tokenizer.json`, else `tokenizer.model` with `added_tokens.json` and `tokenizer_config.json` beside it.

        Raises ValueError naming the folder or file that does not fit.
        """
        folder = as_path(folder)
        settings = _settings(folder)
        if (folder / "tokenizer.json").is_file():
            return cls(_FastTokenizer(folder / "tokenizer.json"), folder, settings)
        if (folder / "tokenizer.model").is_file():
            return cls(_SentencePiece(folder, settings), folder, settings)
        raise ValueError(f"a tokenizer folder needs tokenizer.json or tokenizer.model, but {folder} has neither")

    def digest(self) -> str:
        """Of the files that ids depend on: another tokenizer, another text."""
        content = hashlib.sha256()
        for name in _FILES:
            if (self.folder / name).is_file():
                content.update(name.encode() + (self.folder / name).read_bytes())
        return content.hexdigest()[:32]

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with no start token added."""
        return self._backend.encode(text)

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
    def __init__(self, path: AnyPath):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(path.read_bytes())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        # of a batch, since `encode` keeps the interpreter lock while it works: threads would tokenise one at a time
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _SentencePiece:
    """sentencepiece knows nothing of added tokens: text is split at them first, pieces between are encoded alone."""

    def __init__(self, folder: AnyPath, settings: dict):
        path = folder / "tokenizer.model"
        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.LoadFromSerializedProto(path.read_bytes())
        except Exception as error:  # RuntimeError or OSError, by the kind of damage
            raise ValueError(f"{path} is no sentencepiece model: {error}") from error
        size = self._model.get_piece_size()
        control = {self._model.id_to_piece(i): i for i in range(size) if self._model.is_control(i)}
        added = _added_tokens(folder, settings)
        self._special = control | added
        self._text_of = {i: token for token, i in control.items()} | {i: token for token, i in added.items()}
        self.vocab_size = max(size - 1, *self._special.values()) + 1
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self._split.split(text):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

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


def _settings(folder: AnyPath) -> dict:
    """`tokenizer_config.json`, with token entries given as objects reduced to their text; {} if there is none."""
    settings = _read_json(folder / "tokenizer_config.json")
    return {key: value.get("content", value) if isinstance(value, dict) else value for key, value in settings.items()}


def _added_tokens(folder: AnyPath, settings: dict) -> dict[str, int]:
    decoder = settings.get("added_tokens_decoder") or {}
    return _read_json(folder / "added_tokens.json") | {entry["content"]: int(i) for i, entry in decoder.items()}


def _read_json(path: AnyPath) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content
