"""The model that the agent asks: a vision-language model behind an engine."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from vlmem_jax.agent.calls import Call, Reply
from vlmem_jax.agent.nodes import Frame
from vlmem_jax.generate import Engine, Request, SamplingConfig
from vlmem_jax.processing import Processor
from vlmem_jax.types import Sample


class EngineModel:
    """Answers calls greedily; labels are scored, and never written.

    An engine that keeps features sees each frame once for all calls that show it.
    """

    def __init__(self, engine: Engine, processor: Processor, image_of: Callable[[Frame], Image.Image]):
        """`image_of`: a frame as it was kept."""
        self._engine, self._processor, self._image_of = engine, processor, image_of
        self.calls = 0
        """That were answered."""

    def answer(self, calls: Sequence[Call]) -> list[Reply]:
        """Raises ValueError for a call that there is no room for, with the knob, and for labels that begin alike."""
        samples = [self._sample(call) for call in calls]
        replies: list[Reply | None] = [None] * len(calls)
        written = {
            n: self._engine.submit(Request(samples[n], SamplingConfig(max_new_tokens=call.max_tokens)))
            for n, call in enumerate(calls)
            if not call.labels
        }
        for labels in dict.fromkeys(call.labels for call in calls if call.labels):
            chosen = [n for n, call in enumerate(calls) if call.labels == labels]
            logp_NK = self._engine.score([samples[n] for n in chosen], self._first(labels)).astype(np.float64)
            for n, logp_K in zip(chosen, logp_NK.tolist(), strict=True):
                replies[n] = Reply(tokens=list(zip(labels, logp_K, strict=True)))
        for n, handle in written.items():
            replies[n] = Reply(self._processor.tokenizer.decode(handle.result()))
        self.calls += len(calls)
        return replies

    def _sample(self, call: Call) -> Sample:
        parts = [part if isinstance(part, str) else self._image_of(part) for part in call.parts]
        return self._processor.prompt(parts, name=f"call {call.kind}")

    def _first(self, labels: Sequence[str]) -> list[int]:
        """The first token of each label, by which it is told from the others."""
        first = [self._processor.tokenizer.encode(label)[0] for label in labels]
        if len(set(first)) < len(first):
            raise ValueError(
                f"labels must differ in their first token, but with this tokenizer {', '.join(labels)} begin with "
                f"{', '.join(map(str, first))}"
            )
        return first
