"""What an answer says, and where a memory that speaks was inserted into it."""

from typing import NamedTuple

from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer


class Inserted(NamedTuple):
    """A memory that was inserted."""

    kind: str
    """Its name among `Speech.kinds`: of the memory itself, which is not that of the call where types are reversed."""
    place: int
    """Which of the answer's chosen tokens called for it, from 0."""


class Transcript:
    """An answer as its tokens come. The memory's own tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, speech: Speech | None = None, show_memory: bool = False):
        """`show_memory`: whether `push` also says where a memory was inserted."""
        self.text = ""
        """So far, without what is said of memories."""
        self.chosen = 0
        """Tokens so far that the model chose, or chance for it; neither latent tokens nor those that end them."""
        self.memories: list[Inserted] = []
        self._stream = tokenizer.stream()
        self._calls = speech.invoke_ids if speech else ()
        self._ends = speech.end_ids if speech else ()
        self._speech = speech
        self._show = show_memory

    def push(self, token: int) -> str:
        """What to show when `token` comes, perhaps nothing."""
        if token in self._ends:
            number = self._ends.index(token)
            kind, length = self._speech.kinds[number], self._speech.lengths[number]
            self.memories.append(Inserted(kind, self.chosen - 1))
            return f"[{kind} memory, {length} latent tokens]" if self._show else ""
        self.chosen += 1
        return "" if token in self._calls else self._said(self._stream.push(token))

    def flush(self) -> str:
        """What is left to show at the end."""
        return self._said(self._stream.flush())

    def _said(self, piece: str) -> str:
        self.text += piece
        return piece
