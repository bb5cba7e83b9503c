"""An engine for those who do not know beforehand what they will ask."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from vlmem_jax.generate.engine import Engine, wanted
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import InvocationConfig
from vlmem_jax.generate.requests import Handle, Request
from vlmem_jax.generate.sampling import SamplingConfig
from vlmem_jax.processing import Tokenizer
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.types import Sample


class Pool:
    """An engine of `slots` rows, made at the first request, and made anew, with more room, where one does not fit."""

    def __init__(self, generator: Generator, slots: int, tokenizer: Tokenizer | None = None):
        self.engine: Engine | None = None
        self._generator, self._slots, self._tokenizer = generator, slots, tokenizer
        self._most = [1, 0, 0]
        """Tokens, tiles and forced tokens of the largest request so far."""

    def submit(self, requests: Sequence[Request], spare: int = 0) -> list[Handle]:
        """Those that come together should be given together: room is made for all of them, and for `spare` tokens
        more. Raises as `Engine.submit`, but for what there is no room for."""
        self._hold(requests, spare)
        return [self.engine.submit(request) for request in requests]

    def fork_all(self, groups: Sequence[Sequence[Request]]) -> list[list[Handle]]:
        """Forks each group, see `Engine.fork`."""
        self._hold([request for group in groups for request in group], 0)
        return [self.engine.fork(group) for group in groups]

    def score(self, samples: Sequence[Sample], labels: Sequence[int]) -> Float32[np.ndarray, "N K"]:
        """Log-probability of each label behind each sample, see `Engine.score`."""
        self._hold([Request(sample, SamplingConfig(1)) for sample in samples], 0)
        return self.engine.score(samples, labels)

    def _hold(self, requests: Sequence[Request], spare: int) -> None:
        sizes = [wanted(self._generator, request) for request in requests]
        most = [max(old, *of) for old, of in zip(self._most, zip(*sizes, strict=True), strict=True)]
        shape = PoolShape.of(self._slots, most[0] + spare, most[1], most[2])
        if self.engine is not None and shape.fits(self.engine.shape):
            return
        if self.engine is not None:
            self.engine.run()  # those who are being answered, before their rows go
        self._most = most
        self.engine = Engine(self._generator, shape, self._tokenizer)


def answers(
    generator: Generator,
    samples: Sequence[Sample],
    sampling: SamplingConfig = SamplingConfig(),
    rows: int = 16,
    invocation: InvocationConfig = InvocationConfig(),
) -> list[list[int]]:
    """The answer's ids for each prompt, stop id left out; `rows` prompts are answered side by side. Raises
    RuntimeError where one fails."""
    pool = Pool(generator, min(rows, len(samples)))
    handles = pool.submit([Request(sample, sampling, invocation) for sample in samples])
    return [handle.result() for handle in handles]
