"""What the agent asks of a model, and how it is asked: whoever needs the model is a generator that yields calls and is
sent the replies, so that calls of many videos and questions can be answered side by side."""

import hashlib
import json
from collections.abc import Generator, Hashable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from vlmem_jax.agent.gates import FirstTokens
from vlmem_jax.agent.nodes import Frame

Kind = Literal["caption", "decide", "narrate", "extract", "relevant", "answer", "sufficient"]
"""What is asked for: a segment in words, what becomes of it, an episode in words, what it is about; whether something
bears on a question, its answer, and whether what is known is enough for it."""


class Call(NamedTuple):
    """One thing that is asked of the model."""

    kind: Kind
    parts: tuple[str | Frame, ...]
    """Texts and frames in their order."""
    labels: tuple[str, ...] = ()
    """What the answer must be one of; none: it is free text."""
    max_tokens: int = 1

    @property
    def frames(self) -> list[Frame]:
        """What is shown."""
        return [part for part in self.parts if isinstance(part, Frame)]

    @property
    def text(self) -> str:
        """What is said."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def key(self) -> str:
        """Equal for equal calls alone: of two that are greedy, one has to be made."""
        parts = [part if isinstance(part, str) else list(part) for part in self.parts]
        content = json.dumps([self.kind, parts, self.labels, self.max_tokens])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


class Cost(NamedTuple):
    """What a call took. Of calls that are answered together, what all took is divided by their tokens."""

    prompt_tokens: int = 0
    """Of frames, too."""
    new_tokens: int = 0
    frames: int = 0
    """That were shown: fewer than the call has where there was no room for them."""
    tiles: int = 0
    """That these frames are for the vision tower."""
    seen: float = 0.0
    """Tiles that it saw; the others were there from other calls."""
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(one + more for one, more in zip(self, other, strict=True)))


class Reply(NamedTuple):
    """What the model answers."""

    text: str = ""
    tokens: FirstTokens = None
    """Of a call with labels: the tokens that are one of them, or begin one, with their log-probabilities among all that
    might be said; or, where only first tokens are known, those."""
    cost: Cost = Cost()


class Model(Protocol):
    """Whatever answers calls."""

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        """A reply to each; calls that come together may be answered together."""
        ...


T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
Work = Generator[list[Call], list[Reply], T]
"""`replies = yield calls` is how it asks; what it returns is its result."""


def run(work: Work[T], model: Model) -> T:
    """The result of one."""
    return run_all([work], model)[0]


def run_all(works: Sequence[Work[T]], model: Model) -> list[T]:
    """The results of several, whose calls are answered together as long as they last."""
    results = dict(run_flow(enumerate(works), model, len(works)))
    return [results[n] for n in range(len(works))]


def run_flow(works: Iterable[tuple[K, Work[T]]], model: Model, most: int) -> Iterator[tuple[K, T]]:
    """The results of named ones as they end. At most so many go on side by side, and the next is taken when one has
    ended; so many may come."""
    coming = iter(works)
    waiting: list[tuple[K, Work[T], list[Call]]] = []
    going: list[Work[T]] = []

    def go_on(name: K, work: Work[T], replies: list[Reply] | None) -> Iterator[tuple[K, T]]:
        try:
            waiting.append((name, work, work.send(replies)))
        except StopIteration as end:
            going.remove(work)
            yield name, end.value

    try:
        while True:
            while len(waiting) < most and (taken := next(coming, None)):
                going.append(taken[1])
                yield from go_on(*taken, None)
            if not waiting:
                return
            asked, waiting = waiting, []
            replies = iter(model.answer([call for _, _, calls in asked for call in calls]))
            for name, work, calls in asked:
                yield from go_on(name, work, [next(replies) for _ in calls])
    finally:  # whatever ends it, what they hold is let go
        for work in going:
            work.close()
