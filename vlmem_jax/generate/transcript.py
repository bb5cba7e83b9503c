"""What an answer says, where a text ends it, and where a memory that speaks was inserted into it."""

from collections.abc import Sequence

from vlmem_jax.generate.invocation import Invocation
from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer


class Transcript:
    """An answer as its tokens come. The memory's own tokens are no text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        speech: Speech | None = None,
        show_memory: bool = False,
        until: Sequence[str] = (),
    ):
        """`show_memory`: whether `push` also says where a memory was inserted. `until`: texts of which the first that
        comes, wherever tokens part it, ends the answer and is no part of it."""
        self.text = ""
        """So far, without what is said of memories."""
        self.chosen = 0
        """Tokens so far that the model chose, or chance for it; neither latent tokens nor those that end them."""
        self.memories: list[Invocation] = []
        self._stream = tokenizer.stream()
        self._calls = speech.invoke_ids if speech else ()
        self._ends = speech.end_ids if speech else ()
        self._speech = speech
        self._show = show_memory
        self._until = tuple(end for end in until if end)
        self._held = ""
        self.ended = False
        """Whether one of `until` has come; what comes then is not said."""

    def push(self, token: int) -> str:
        """What to show when `token` comes, perhaps nothing."""
        if token in self._ends:
            number = self._ends.index(token)
            kind, length = self._speech.kinds[number], self._speech.lengths[number]
            self.memories.append(Invocation(number, self.chosen + len(self.memories), length))
            return f"[{kind} memory, {length} latent tokens]" if self._show else ""
        self.chosen += 1
        return "" if token in self._calls else self._said(self._stream.push(token))

    @property
    def called(self) -> list[tuple[str, int]]:
        """The kind of each memory by its name, and which of the chosen tokens called for it, from 0."""
        return [(self._speech.kinds[one.kind], one.place - n - 1) for n, one in enumerate(self.memories)]

    def flush(self) -> str:
        """What is left to show at the end."""
        return self._said(self._stream.flush(), last=True)

    def _said(self, piece: str, last: bool = False) -> str:
        """The part of what has come that can be no beginning of an end."""
        if self.ended:
            return ""
        held = self._held + piece
        found = [(at, end) for end in self._until if (at := held.find(end)) >= 0]
        if found:
            self.ended, said = True, held[: min(found)[0]]
        else:
            kept = 0 if last else max((_begun(held, end) for end in self._until), default=0)
            said = held[: len(held) - kept]
        self._held = held[len(said) :]
        self.text += said
        return said


def _begun(text: str, end: str) -> int:
    """Letters at the end of a text that another begins with, short of all of it."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)
