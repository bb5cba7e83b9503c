"""The model that the agent asks: a vision-language model behind an engine."""

import collections
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from vlmem_jax.agent.calls import Call, Cost, Reply
from vlmem_jax.agent.nodes import Frame
from vlmem_jax.agent.prompts import shortened
from vlmem_jax.generate import Engine, Request, SamplingConfig
from vlmem_jax.processing import Processor, Tokenizer
from vlmem_jax.types import Sample

_SIGNS = re.compile(r"^[\W_]+|[\W_]+$")


@dataclasses.dataclass(frozen=True)
class ShowConfig:
    """How closely frames are looked at, where their size decides how many visual tokens they are."""

    tokens: int = 128
    """Visual tokens of a frame, at most; 0: there is no limit, as in the release."""
    answer_tokens: int = 256
    """The same where a question is answered."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")


class EngineModel:
    """Answers calls greedily; labels are scored, and never written.

    An engine that keeps features sees each frame once for all calls that show it at one size. A call that a row has no
    room for is shortened, see `prompts.shortened`.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        image_of: Callable[[Frame], Image.Image],
        config: ShowConfig = ShowConfig(),
    ):
        """`image_of`: a frame as it was kept."""
        self._engine, self._processor, self._image_of = engine, processor, image_of
        near, far = processor.limited(config.answer_tokens), processor.limited(config.tokens)
        self._processors = {"answer": near, "sufficient": near}
        self._otherwise = far
        self.calls = 0
        """That were answered."""

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        """Raises ValueError for a call that there is no room for however short, with the knob, and for labels that
        begin alike."""
        started, features = time.perf_counter(), self._engine.features
        seen = features.seen if features else 0
        fitted = [self._fitted(call) for call in calls]
        replies: list[Reply | None] = [None] * len(calls)
        written = {
            n: self._engine.submit(Request(sample, SamplingConfig(max_new_tokens=call.max_tokens)))
            for n, (call, sample) in enumerate(fitted)
            if not call.labels
        }
        for labels in dict.fromkeys(call.labels for call in calls if call.labels):
            chosen, ids = [n for n, call in enumerate(calls) if call.labels == labels], self._ids(labels)
            logp_NK, mass_N = self._engine.labels([fitted[n][1] for n in chosen], list(ids))
            for n, logp_K, mass in zip(chosen, logp_NK.tolist(), mass_N.tolist(), strict=True):
                replies[n] = Reply(
                    tokens=[(text, logp + mass) for text, logp in zip(ids.values(), logp_K, strict=True)]
                )
        for n, handle in written.items():
            replies[n] = Reply(self._processor.tokenizer.decode(handle.result()))
        lengths = [len(written[n].tokens) if n in written else 0 for n in range(len(calls))]
        seen = features.seen - seen if features else None
        self.calls += len(calls)
        costs = _costs(fitted, lengths, seen, time.perf_counter() - started)
        return [reply._replace(cost=cost) for reply, cost in zip(replies, costs, strict=True)]

    # --- prompts ------------------------------------------------------------------------------------------------------

    def _fitted(self, call: Call) -> tuple[Call, Sample]:
        """A call as it fits a row, as far as it can, and its prompt."""
        shape, new = self._engine.shape, 0 if call.labels else call.max_tokens
        while True:
            sample = self._sample(call)
            tiles, room = len(sample.pixels_ISSc), max(shape.capacity - new, 1)
            share = min(room / len(sample.tokens_T), shape.tiles / tiles if tiles else 1.0)
            if share >= 1 or (shorter := shortened(call, share)) == call:
                return call, sample
            call = shorter

    def _sample(self, call: Call) -> Sample:
        parts = [part if isinstance(part, str) else self._image_of(part) for part in call.parts]
        return self._processors.get(call.kind, self._otherwise).prompt(parts, name=f"call {call.kind}")

    # --- labels -------------------------------------------------------------------------------------------------------

    def _ids(self, labels: Sequence[str]) -> dict[int, str]:
        """The tokens that count for labels, and what each says: all that are one of them in any case, with spaces and
        signs around it, where each label is a token; else the first of each, by which it is told from the others."""
        encoded = [self._processor.tokenizer.encode(label) for label in labels]
        if all(len(ids) == 1 for ids in encoded):
            return {n: text for label in dict.fromkeys(map(str.casefold, labels)) for n, text in self._alike[label]}
        first = {ids[0]: label for ids, label in zip(encoded, labels, strict=True)}
        if len(first) < len(labels):
            raise ValueError(
                f"labels must differ in their first token, but with this tokenizer {', '.join(labels)} begin with "
                f"{', '.join(str(ids[0]) for ids in encoded)}"
            )
        return first

    @functools.cached_property
    def _alike(self) -> dict[str, list[tuple[int, str]]]:
        vocab = min(self._processor.tokenizer.vocab_size, self._engine.vlm.config.decoder.vocab)
        return spellings(self._processor.tokenizer, sorted(set(range(vocab)) - set(self._engine.generator.banned_ids)))


def spellings(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[str, list[tuple[int, str]]]:
    """Tokens with their texts, by what they say but for case, and spaces and signs around it."""
    found = collections.defaultdict(list)
    for n in ids:
        text = tokenizer.decode([n])
        if "\ufffd" not in text and (bare := _SIGNS.sub("", text)):
            found[bare.casefold()].append((n, text))
    return dict(found)


def _costs(
    fitted: Iterable[tuple[Call, Sample]], lengths: Sequence[int], seen: int | None, seconds: float
) -> list[Cost]:
    """Of each call; `seen`: tiles that the tower saw for all of them, None where it saw all there are."""
    own = [
        Cost(len(sample.tokens_T), new, len(call.frames), tiles := len(sample.pixels_ISSc), tiles)
        for (call, sample), new in zip(fitted, lengths, strict=True)
    ]
    tokens, tiles = (max(sum(of), 1) for of in zip(*((sum(one[:2]), one.tiles) for one in own), strict=True))
    return [
        one._replace(
            seen=float(one.tiles if seen is None else seen * one.tiles / tiles),
            seconds=seconds * sum(one[:2]) / tokens,
        )
        for one in own
    ]
