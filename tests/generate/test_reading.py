"""Prompts are answered that show what was seen before, and what comes after text has been read."""

import dataclasses

import jax
import numpy as np
import pytest

from vlmem_jax.generate import Engine, Generator, Request, SamplingConfig
from vlmem_jax.generate.prompts import filled
from vlmem_jax.models import VLM
from vlmem_jax.runtime.shapes import PoolShape

GREEDY = SamplingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine(vlm, params):
    """Of the model without its memory, which images may reach late; in chunks of 16 tokens."""
    model = VLM(dataclasses.replace(vlm.config, memory=None))
    without = {name: part for name, part in params.items() if name != "memory"}
    return Engine(Generator(model, without, stop_ids=[]), PoolShape(slots=2, capacity=96, chunk=16, tiles=3))


def answer(engine, *requests):
    """Of the last of requests that follow on each other."""
    handle = None
    for request in requests:
        handle = engine.submit(dataclasses.replace(request, after=handle, keep=request is not requests[-1]))
        handle.result()
    return handle


def assert_equal(one, other):
    assert one.tokens == other.tokens and (one.length, one.read) == (other.length, other.read)
    np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)


@pytest.mark.parametrize("length", [8, 20], ids=["in a piece", "in chunks"])
def test_a_prompt_whose_tokens_were_made_before_is_read_as_with_its_images(engine, make_prompt, length):
    sample, vlm = make_prompt(length, 2, 1), engine.vlm
    views = filled([sample], 1, vlm.tile, len(sample.tokens_T), 2).views
    visual = jax.jit(vlm.see)(engine.generator.params, views)
    without = dataclasses.replace(
        sample, pixels_ISSc=sample.pixels_ISSc[:0], visual_positions_M=sample.visual_positions_M[:0]
    )
    recalled = answer(engine, Request(without, GREEDY, visual=visual))
    assert_equal(recalled, answer(engine, Request(sample, GREEDY)))
    blank = Request(dataclasses.replace(sample, pixels_ISSc=np.zeros_like(sample.pixels_ISSc)), GREEDY)
    assert not np.allclose(answer(engine, blank).logp, recalled.logp, atol=1e-4), "it depends on what is shown"


def test_an_image_that_comes_late_is_seen_as_if_read_at_once(engine, make_prompt):
    """Behind an answer of a token that the prompt with both holds, too."""
    first, second, per_tile = make_prompt(12, 1, 1), make_prompt(9, 2, 2), engine.vlm.tokens_per_tile
    begun = Request(first, SamplingConfig(max_new_tokens=1))
    said = answer(engine, begun).tokens
    at, one = first.positions_T.max() + 2, np.ones(1, np.int32)
    both = dataclasses.replace(
        first,
        tokens_T=np.concatenate([first.tokens_T, np.array(said, np.int32), second.tokens_T]),
        labels_T=np.concatenate([first.labels_T, -100 * one, second.labels_T]),
        positions_T=np.concatenate([first.positions_T, (at - 1) * one, second.positions_T + at]),
        visual_index_T=np.concatenate(
            [first.visual_index_T, -one, np.where(second.visual_index_T < 0, -1, second.visual_index_T + per_tile)]
        ),
        pixels_ISSc=np.concatenate([first.pixels_ISSc, second.pixels_ISSc]),
        visual_positions_M=np.concatenate([first.visual_positions_M, second.visual_positions_M + at]),
    )
    at_once, late = answer(engine, Request(both, GREEDY)), answer(engine, begun, Request(second, GREEDY))
    assert at_once.tokens == late.tokens and at_once.length == late.length
    np.testing.assert_allclose(late.logp, at_once.logp, atol=1e-5)
