"""What is asked of an engine, and what comes of it."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from vlmem_jax.generate.invocation import Invocation, InvocationConfig
from vlmem_jax.generate.rows import Row
from vlmem_jax.generate.sampling import SamplingConfig
from vlmem_jax.generate.transcript import Transcript
from vlmem_jax.types import Sample, VisualTokens

if TYPE_CHECKING:
    from vlmem_jax.generate.engine import Engine

Reason = Literal["stop", "text", "length", "cancelled", "failed"]
"""What ended an answer: a stop id, a text of `Request.until`, its longest length, the caller, or an error."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    sample: Sample
    sampling: SamplingConfig = SamplingConfig()
    invocation: InvocationConfig = InvocationConfig()
    """The rules of a memory that speaks."""
    key_2: np.ndarray | None = None
    """The numbers of a random key, in place of the seed."""
    forced: Sequence[int] = ()
    """What the answer begins with; -1 leaves a token to the model."""
    banned_ids: Sequence[int] = ()
    """Ids that are never chosen, beside those of the model."""
    stop_ids: Sequence[int] = ()
    """Ids that end the answer, beside those of the model."""
    until: Sequence[str] = ()
    """Texts that end the answer, as in `Transcript`."""
    visual: VisualTokens | None = None
    """What the prompt shows, where it was seen before: of one row; the sample then has no tiles."""
    after: "Handle | None" = None
    """The answer, kept, behind which the sample stands. Its positions count from 0."""
    keep: bool = False
    """Whether another request can go on after the answer."""
    record: bool = False
    """Whether to record from what memories were formed."""
    on_token: Callable[[int], None] | None = None
    """A function that is called with each token of the answer as it comes."""


class Handle:
    """A request on its way: queued, reading, decoding (or waiting for a memory), done."""

    def __init__(self, engine: "Engine", request: Request):
        self.request = request
        self.tokens: list[int] = []
        """What followed the prompt so far, with the stop id that ended it and the ids that end memories."""
        self.logp: list[float] = []
        """Log-probability of each when it was drawn, see `sampling.choose`; NaN where nobody drew it."""
        self.invocations: list[Invocation] = []
        self.reason: Reason | None = None
        """Why it is done; None: it is not."""
        self.error = ""
        """Why it failed."""
        self.row: Row | None = None
        """The row of an answer that was kept."""
        self.read = 0
        """Tokens of the prompt by whose length rotary frequencies were chosen."""
        self.length = 0
        """Tokens in the cache."""
        self.chosen = 0
        """Tokens so far that the model chose, or others for it; those that end memories left out."""
        self.ahead = 0
        """Tokens that are on their way to the host."""
        self.observed = 0
        """Tokens since the prompt or the last memory, which the next one is formed from."""
        self.calls_left = 0
        self.waits = False
        """Whether it has called for a memory that is not there yet."""
        self.transcript: Transcript | None = None
        """What it says, where texts can end it."""
        self._engine = engine

    @property
    def is_last(self) -> bool:
        """Whether the last token that it may have is on its way, whatever it is."""
        return self.chosen + self.ahead >= self.request.sampling.max_new_tokens and not self.calls_left

    @property
    def answer(self) -> list[int]:
        """The tokens so far, without the stop id."""
        return self.tokens[:-1] if self.reason == "stop" else list(self.tokens)

    def __iter__(self) -> Iterator[int]:
        """The tokens of the answer as they come. Raises RuntimeError, with its words, where it fails."""
        place = 0
        while True:
            while place < len(self.tokens) - (self.reason == "stop"):
                yield self.tokens[place]
                place += 1
            if self.reason:
                break
            self._step()
        self._raise()

    def result(self) -> list[int]:
        """The whole answer. Raises RuntimeError, with its words, where it fails."""
        while not self.reason:
            self._step()
        self._raise()
        return self.answer

    def _step(self) -> None:
        if not self._engine.step() and not self.reason:
            raise RuntimeError("this request was taken out of the engine, which has nothing else to do; put it back")

    def cancel(self) -> None:
        """Frees what it takes; what has come stays. Nothing to one that is done."""
        self._engine.cancel(self)

    def _raise(self) -> None:
        if self.reason == "failed":
            raise RuntimeError(self.error)
