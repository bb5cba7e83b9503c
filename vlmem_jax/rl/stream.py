"""The prompts of training, one after the other, read ahead by threads; and those held out."""

import collections
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from vlmem_jax.data import DataConfig, Prompt, Prompts
from vlmem_jax.data.plan import SKIP_HINT, draws
from vlmem_jax.data.samples import Key
from vlmem_jax.processing import Processor
from vlmem_jax.runtime import hosts
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
        processor: Processor,
        data: DataConfig,
        seed: int,
        ahead: int,
        wanted: Callable[[Prompt], bool],
        check: Callable[[Prompt], None],
        fits: Callable[[Prompt, Sample], None],
    ):
        self.prompts, self.data, self.seed = Prompts(data.train, processor), data, seed
        self._held_out = Prompts(data.eval, processor)
        self.skipped: dict[str, str] = {}
        self.drawn = 0
        """Prompts that were taken or left out so far."""
        self._ahead, self._wanted, self._check, self._fits = ahead, wanted, check, fits
        self._pool = ThreadPoolExecutor(data.thread_count, thread_name_prefix="prompts")
        self._keys: Iterator[Key] | None = None
        self._waiting: collections.deque[tuple[Key, Future]] = collections.deque()

    def held_out(self, count: int) -> Iterator[list[Loaded]]:
        """The prompts of `data.eval` that can be used, in order, `count` lines at a time.

        Raises ValueError for one that cannot, unless such are skipped.
        """
        keys = [(file, line) for file, lines in enumerate(self._held_out.counts) for line in range(lines)]
        for first in range(0, len(keys), count):
            loaded = self._pool.map(self._load_held_out, keys[first : first + count])
            if usable := [one for one in loaded if one is not None]:
                yield usable

    def _load_held_out(self, key: Key) -> Loaded | None:
        try:
            return self._load(key, self._held_out)
        except ValueError:
            if self.data.on_bad_sample == "raise":
                raise
            return None

    def load(self, key: Key) -> Loaded:
        """A prompt that was drawn before."""
        return Loaded(key, self.prompts[key], self.prompts.sample(key))

    def _load(self, key: Key, prompts: Prompts) -> Loaded | None:
        """A prompt, or None if it is not wanted. Raises ValueError if it cannot be used."""
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
                self._waiting.append((key, self._pool.submit(self._load, key, self.prompts)))
            key, future = self._waiting.popleft()
            self.drawn += 1
            name = self.prompts.name(key)
            try:
                if loaded := future.result():
                    return loaded
                self.skipped[name] = f"a prompt must have an answer to be learned from (sample {name})"
            except ValueError as error:
                if self.data.on_bad_sample == "raise":
                    raise ValueError(f"{error}; {SKIP_HINT}") from error
                self.skipped[name] = str(error)
            if len(self.skipped) == sum(self.prompts.counts):
                raise ValueError(f"no prompt of the data can be used; one of them: {self.skipped[name]}")

    def take_same(self, count: int) -> list[Loaded]:
        """The next `count` prompts. Raises ValueError as `take` does, and where hosts read different ones."""
        loaded = [self.take() for _ in range(count)]
        read = {f"prompt {n}": [one.prompt.name, len(one.sample.tokens_T)] for n, one in enumerate(loaded)}
        hosts.require_same("hosts must read the same prompts", read)
        return loaded

    def go_to(self, drawn: int) -> None:
        """Goes on as if so many prompts had been drawn."""
        self._keys, self.drawn = None, drawn
        self._waiting.clear()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_fits(data: DataConfig, prompt: Prompt, sample: Sample, answer: int, or_lower: str = "") -> None:
    """Raises ValueError if a row cannot hold a prompt and `answer` tokens behind it; `or_lower` is a key that helps."""
    tokens, tiles = len(sample.tokens_T), len(sample.pixels_ISSc)
    if tokens + answer > data.pack_tokens:
        raise ValueError(
            f"a row must hold a prompt and its answer, {data.pack_tokens} tokens, but this prompt has {tokens} and the "
            f"answer, with its memories, may have {answer}; raise data.pack_tokens"
            f"{or_lower and f' or lower {or_lower}'} (sample {prompt.name})"
        )
    if tiles > data.pack_tiles:
        raise ValueError(
            f"a row has {data.pack_tiles} tiles but this prompt has {tiles}; raise data.pack_tiles "
            f"(sample {prompt.name})"
        )
