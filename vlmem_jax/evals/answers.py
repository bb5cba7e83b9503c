"""Answers to a batch of prompts, with where memories were inserted."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlmem_jax.generate import Generator, InvocationConfig, SamplingConfig, Transcript
from vlmem_jax.generate.loop import FINISHED
from vlmem_jax.processing import Tokenizer
from vlmem_jax.types import Sample


class Answer(NamedTuple):
    """What followed a prompt."""

    transcript: Transcript
    stopped: bool
    """Whether a stop id ended it; if not, it was cut off."""


def answer(
    generator: Generator,
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    keys_B: Array,
    sampling: SamplingConfig,
    invocation: InvocationConfig,
    rows: int,
) -> list[Answer]:
    """The answer to each prompt, drawn with its own random key of `keys_B`. `rows`: size of the batch."""
    session = generator.start(samples, sampling.max_new_tokens, rows)
    padding_B = jnp.broadcast_to(keys_B[:1], session.logits_BV.shape[0] - len(samples))
    drawn = session.draw(sampling, jnp.concatenate([keys_B, padding_B]), invocation)
    tokens_BT = np.stack([tokens_B for tokens_B, _ in drawn], axis=1)
    return [_answer(row_T[row_T != FINISHED].tolist(), generator, tokenizer) for row_T in tokens_BT]


def _answer(ids: list[int], generator: Generator, tokenizer: Tokenizer) -> Answer:
    stopped = ids[-1] in generator.stop_ids
    transcript = Transcript(tokenizer, generator.vlm.speech)
    for token in ids[: len(ids) - stopped]:
        transcript.push(token)
    transcript.flush()
    return Answer(transcript, stopped)


def random_keys(seed: int, places: Sequence[tuple[int, ...]]) -> Array:
    """A random key for each place, numbers of equal count such as (file, line), whatever the others are."""

    def fold(numbers) -> Array:
        key = jax.random.key(np.uint32(seed % 2**32))
        for number in numbers:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(fold)(jnp.array(places, jnp.uint32))
