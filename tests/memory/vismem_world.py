"""What tests of VisMem share: sizes of batches, sampling, who calls, and numbers."""

import jax.numpy as jnp
import numpy as np

from vlmem_jax.generate import InvocationConfig, SamplingConfig
from vlmem_jax.runtime.shapes import PoolShape

ROWS = 4
"""Of every batch and engine, so that all tests run the same programs."""
NEW = 10
SHAPE = PoolShape(ROWS, capacity=128, chunk=128, tiles=16, forced=16).in_a_piece
SAMPLED = SamplingConfig(max_new_tokens=NEW, temperature=1.0, seed=3)
GREEDY = SamplingConfig(max_new_tokens=NEW)
RULE = InvocationConfig("delimiter_random", probability=0.0)
"""Only the caller calls."""


def normal(seed, shape):
    """Drawn on the host."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def calls(speech, *at: tuple[int, int]) -> list[int]:
    """A row's forced tokens: calls for kinds at places."""
    forced = [-1] * (max((place for place, _ in at), default=-1) + 1)
    for place, kind in at:
        forced[place] = speech.invoke_ids[kind]
    return forced
