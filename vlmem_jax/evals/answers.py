"""Answers to many prompts, with where memories were inserted."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlmem_jax.generate import Generator, InvocationConfig, SamplingConfig, Transcript
from vlmem_jax.generate.pools import Pool
from vlmem_jax.generate.requests import Handle, Request
from vlmem_jax.processing import Tokenizer
from vlmem_jax.types import Sample


class Answer(NamedTuple):
    """What followed a prompt."""

    transcript: Transcript
    stopped: bool
    """Whether a stop id ended it; if not, it was cut off."""


class Answering:
    """Prompts as they are handed in, each answered with its own random key by one of `rows` rows."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, rows: int):
        self._pool, self._generator, self._tokenizer = Pool(generator, rows), generator, tokenizer

    def submit(
        self, samples: Sequence[Sample], keys_N: Array, how: Sequence[SamplingConfig], invocation: InvocationConfig
    ) -> list[Handle]:
        """On their way to an answer, each with its own settings."""
        each = zip(samples, how, np.asarray(jax.random.key_data(keys_N)), strict=True)
        return self._pool.submit([Request(sample, sampling, invocation, key_2) for sample, sampling, key_2 in each])

    def step(self) -> None:
        """Goes on with all of them by a token."""
        self._pool.engine.step()

    def answer(self, handle: Handle) -> Answer:
        """What came of a prompt. Raises ValueError where its scores were not finite."""
        if handle.reason == "failed":
            raise ValueError(handle.error)
        transcript = Transcript(self._tokenizer, self._generator.vlm.speech)
        for token in handle.answer:
            transcript.push(token)
        transcript.flush()
        return Answer(transcript, handle.reason == "stop")


def random_keys(seed: int, places: Sequence[tuple[int, ...]]) -> Array:
    """A random key for each place, numbers of equal count such as (file, line), whatever the others are."""

    def fold(numbers) -> Array:
        key = jax.random.key(np.uint32(seed % 2**32))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(fold)(jnp.array(places, jnp.uint32))
