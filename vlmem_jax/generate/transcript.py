"""What an answer says, and where a memory that speaks was inserted into it."""

from vlmem_jax.generate.invocation import Invocation
from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer


class Transcript:
    """An answer as its tokens come. The memory's own tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, speech: Speech | None = None, show_memory: bool = False):
        """`show_memory`: whether `push` also says where a memory was inserted."""
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
        return self._said(self._stream.flush())

    def _said(self, piece: str) -> str:
        self.text += piece
        return piece
