"""Answers to many prompts, with where memories were inserted."""

import dataclasses
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


class Likelihood(NamedTuple):
    """How probable it is that a text follows a prompt."""

    logp: float
    """The sum over its tokens, in fp32, under the softmax of all tokens that may be chosen."""
    greedy: bool
    """Whether each of its tokens is the most probable one."""


class Answering:
    """Prompts as they are handed in, each answered with its own random key by one of `rows` rows."""

    def __init__(self, generator: Generator, tokenizer: Tokenizer, rows: int):
        self.rows, self._pool = rows, Pool(generator, rows)
        self._generator, self._tokenizer = generator, tokenizer

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

    def likelihoods(
        self, samples: Sequence[Sample], given: Sequence[Sequence[Sequence[int]]], invocation: InvocationConfig
    ) -> list[list[Likelihood]]:
        """Of the texts `given` behind each prompt, at least one of at least one token, which is read once for all of
        them. Raises RuntimeError where scores are not finite."""
        found = []
        for first in range(0, len(samples), self.rows):
            some = slice(first, first + self.rows)
            asked = [_weighed(*one, invocation) for one in zip(samples[some], given[some], strict=True)]
            for (prompt, answer), texts in zip(self._pool.fork_all(asked), given[some], strict=True):
                prompt.result(), answer.result()
                said, scores = answer.tokens[1:], self._pool.engine.score(prompt, texts)
                prompt.row = None  # its cache
                each = zip(texts, scores, strict=True)
                found.append([Likelihood(float(logp_T.sum()), said[: len(ids)] == list(ids)) for ids, logp_T in each])
        return found


def _weighed(sample: Sample, texts: Sequence[Sequence[int]], invocation: InvocationConfig) -> list[Request]:
    """Two answers to a prompt: one that is kept where the prompt ends, to be scored there, and the most probable one.
    Both begin with the last token of the prompt, since an answer has one."""
    per_token = "tokens_T", "labels_T", "positions_T", "visual_index_T"
    begun = dataclasses.replace(sample, **{name: getattr(sample, name)[:-1] for name in per_token})
    last = (int(sample.tokens_T[-1]),)
    longest = SamplingConfig(max_new_tokens=1 + max(map(len, texts)))
    return [
        Request(begun, SamplingConfig(max_new_tokens=1), invocation, forced=last, keep=True),
        Request(begun, longest, invocation, forced=last),
    ]


def random_keys(seed: int, places: Sequence[tuple[int, ...]]) -> Array:
    """A random key for each place, numbers of equal count such as (file, line), whatever the others are."""

    def fold(numbers) -> Array:
        key = jax.random.key(np.uint32(seed % 2**32))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(fold)(jnp.array(places, jnp.uint32))
