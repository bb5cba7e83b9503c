"""The prompts of training, one after the other, read ahead by threads."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from vlmem_jax.data import DataConfig, Prompt, Prompts
from vlmem_jax.data.plan import SKIP_HINT, draws
from vlmem_jax.data.samples import Key
from vlmem_jax.types import Sample


class Loaded(NamedTuple):
    """A prompt that can be used."""

    key: Key
    prompt: Prompt
    sample: Sample


class PromptStream:
    """An endless mixture of the prompts of `data.train`: a function of files and seed, so `drawn` is all its state.

    `check(prompt)` and `fits(prompt, sample)` raise ValueError for what cannot be used, which follows
    `data.on_bad_sample`; what `wanted(prompt)` refuses is left out in any case. Both are remembered in `skipped`.
    """

    def __init__(
        self,
        prompts: Prompts,
        data: DataConfig,
        seed: int,
        ahead: int,
        wanted: Callable[[Prompt], bool],
        check: Callable[[Prompt], None],
        fits: Callable[[Prompt, Sample], None],
    ):
        self.prompts, self.data, self.seed = prompts, data, seed
        self.skipped: dict[str, str] = {}
        self.drawn = 0
        """Prompts that were taken or left out so far."""
        self._ahead, self._wanted, self._check, self._fits = ahead, wanted, check, fits
        self._pool = ThreadPoolExecutor(data.thread_count, thread_name_prefix="prompts")
        self._keys: Iterator[Key] | None = None
        self._waiting: collections.deque[tuple[Key, Future]] = collections.deque()

    def load(self, key: Key, prompts: Prompts | None = None) -> Loaded | None:
        """A prompt, of those of training or others, or None if it is not wanted.

        Raises ValueError if it cannot be used.
        """
        prompts = prompts or self.prompts
        prompt = prompts[key]
        if not self._wanted(prompt):
            return None
        self._check(prompt)
        sample = prompts.sample(key)
        self._fits(prompt, sample)
        return Loaded(key, prompt, sample)

    def take(self) -> Loaded:
        """The next prompt. Raises ValueError for one that cannot be used, and where none can."""
        if self._keys is None:
            weights = [source.weight for source in self.data.train]
            self._keys = itertools.islice(draws(self.prompts.counts, weights, self.seed), self.drawn, None)
        while True:
            while len(self._waiting) <= self._ahead:
                key = next(self._keys)
                self._waiting.append((key, self._pool.submit(self.load, key)))
            key, future = self._waiting.popleft()
            self.drawn += 1
            name = self.prompts.name(key)
            try:
                if loaded := future.result():
                    return loaded
                self.skipped[name] = f"a prompt must have an answer to be scored (sample {name})"
            except ValueError as error:
                if self.data.on_bad_sample == "raise":
                    raise ValueError(f"{error}; {SKIP_HINT}") from error
                self.skipped[name] = str(error)
            if len(self.skipped) == sum(self.prompts.counts):
                raise ValueError(f"no prompt of the data can be used; one of them: {self.skipped[name]}")

    def go_to(self, drawn: int) -> None:
        """Goes on as if so many prompts had been drawn."""
        self._keys, self.drawn = None, drawn
        self._waiting.clear()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
