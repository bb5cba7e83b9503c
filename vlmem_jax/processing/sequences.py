"""Texts, and pairs of texts, as the sequences of tokens that bidirectional encoders read."""

from collections.abc import Sequence
from typing import NamedTuple

import tokenizers

from vlmem_jax.paths import AnyPath


class Tokens(NamedTuple):
    """A sequence."""

    ids: Sequence[int]
    types: Sequence[int]
    """Which text of a pair each belongs to, as far as the encoder cares."""


class SequenceTokenizer:
    """Puts the tokens that begin, part and end texts where `tokenizer.json` says; forged ones in a text are left out.

    What is longer than `longest` tokens is cut, of a pair the longer text first.
    """

    def __init__(self, path: AnyPath, longest: int, types: int):
        """`types`: how many the encoder tells apart. Raises ValueError for a file that is missing, damaged or without
        such tokens, and where `longest` has no room for a token of each text."""
        if not path.is_file():
            raise ValueError(f"an encoder of text needs tokenizer.json, but there is no {path}")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is no tokenizer: {error}") from error
        self._marks = set(self._tokenizer.encode("", "").ids)
        if not self._marks:
            raise ValueError(f"{path} must say which tokens begin and end a text, by its key post_processor")
        room = longest - self._tokenizer.num_special_tokens_to_add(True)
        if room < 2:
            raise ValueError(f"a pair of texts must have room beside {longest - room} special tokens; got {longest}")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(longest, strategy="longest_first")
        self._tokenizer.encode_special_tokens = True  # as the text that they are
        self.longest, self._types = longest, types
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        """Ids are smaller than this."""

    def texts(self, texts: Sequence[str]) -> list[Tokens]:
        """Each text as a sequence."""
        return self._encode([_clean(text) for text in texts])

    def pairs(self, first: str, texts: Sequence[str]) -> list[Tokens]:
        """Each text as one sequence with `first` before it."""
        return self._encode([(_clean(first), _clean(text)) for text in texts])

    def _encode(self, inputs: list) -> list[Tokens]:
        return [self._tokens(one) for one in self._tokenizer.encode_batch_fast(inputs, add_special_tokens=True)]

    def _tokens(self, one: tokenizers.Encoding) -> Tokens:
        """Vocabularies of sentencepiece have the marks as words, too."""
        rows = zip(one.ids, one.type_ids, one.special_tokens_mask, strict=True)
        kept = [(i, min(kind, self._types - 1)) for i, kind, is_own in rows if is_own or i not in self._marks]
        return Tokens(*map(list, zip(*kept, strict=True)))


def _clean(text: str) -> str:
    """Without halves of characters, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
