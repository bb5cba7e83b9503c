"""Long prompts in chunks, and images that come after text has been read."""

import dataclasses

import jax
import numpy as np
import pytest

from vlmem_jax.generate import Generator, SamplingConfig, loop
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

GREEDY = SamplingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def plain(vlm, params):
    """The model without its memory, which images may reach late."""
    model = VLM(dataclasses.replace(vlm.config, memory=None))
    return Generator(model, {name: part for name, part in params.items() if name != "memory"}, stop_ids=[])


@pytest.mark.parametrize("sizes", [None, dict(data=2, fsdp=1, tensor=2)], ids=["one device", "a mesh"])
def test_a_prompt_in_chunks_is_read_as_in_a_piece(monkeypatch, vlm, params, make_prompt, sizes):
    mesh = None if sizes is None else make_mesh(MeshConfig(**sizes), jax.devices()[:4])
    generator = Generator(vlm, params, stop_ids=[], mesh=mesh)
    prompts = [make_prompt(90, 2, 1), make_prompt(20, 1, 2)]  # the short one ends in the first chunk
    whole = generator.start(prompts, 8, copies=2)
    monkeypatch.setattr(loop, "PREFILL_CHUNK", 40)
    chunked = generator.start(prompts, 8, copies=2)
    np.testing.assert_allclose(chunked.logits_BV, whole.logits_BV, atol=1e-5)
    for name in ("length_B", "position_B", "frequencies_BR"):
        np.testing.assert_array_equal(getattr(chunked.state, name), getattr(whole.state, name))
    drawn = [np.stack([tokens for tokens, _ in session.draw(GREEDY)]) for session in (whole, chunked)]
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("chunk", [loop.PREFILL_CHUNK, 16])
def test_a_prompt_whose_tokens_were_made_before_is_read_as_with_its_images(monkeypatch, plain, make_prompt, chunk):
    monkeypatch.setattr(loop, "PREFILL_CHUNK", chunk)
    sample, tile = make_prompt(20, 2, 1), plain.vlm.tile
    whole = plain.start([sample], 8)
    visual = plain.programs.see(plain.params, pad_prompts([sample], 1, tile).views)
    without = dataclasses.replace(
        sample, pixels_ISSc=sample.pixels_ISSc[:0], visual_positions_M=sample.visual_positions_M[:0]
    )
    recalled = plain.recall(without, visual, 8, spare=50)
    np.testing.assert_allclose(recalled.logits_BV, whole.logits_BV, atol=1e-5)
    assert (recalled.length, recalled.read) == (whole.length, whole.read)
    assert recalled.state.cache.k_LBKSC.shape == plain.start([make_prompt(70, 2, 1)], 8).state.cache.k_LBKSC.shape
    drawn = [np.stack([tokens for tokens, _ in session.draw(GREEDY)]) for session in (whole, recalled)]
    np.testing.assert_array_equal(*drawn)


def test_an_image_that_comes_late_is_seen_as_if_read_at_once(plain, make_prompt):
    first, second, per_tile = make_prompt(12, 1, 1), make_prompt(9, 2, 2), plain.vlm.tokens_per_tile
    at = first.positions_T.max() + 1
    both = dataclasses.replace(
        first,
        tokens_T=np.concatenate([first.tokens_T, second.tokens_T]),
        labels_T=np.concatenate([first.labels_T, second.labels_T]),
        positions_T=np.concatenate([first.positions_T, second.positions_T + at]),
        visual_index_T=np.concatenate(
            [first.visual_index_T, np.where(second.visual_index_T < 0, -1, second.visual_index_T + per_tile)]
        ),
        pixels_ISSc=np.concatenate([first.pixels_ISSc, second.pixels_ISSc]),
        visual_positions_M=np.concatenate([first.visual_positions_M, second.visual_positions_M + at]),
    )
    at_once, session = plain.start([both], 8), plain.start([first], 64)
    session.append(second)
    np.testing.assert_allclose(session.logits_BV, at_once.logits_BV, atol=1e-5)
    assert session.state.position_B == at_once.state.position_B and session.length == at_once.length


def test_a_memory_that_all_tokens_read_cannot_see_it(vlm, params, make_prompt):
    session = Generator(vlm, params, stop_ids=[]).start([make_prompt(12, 1)], 64)
    with pytest.raises(ValueError, match="images must come before the first token is read"):
        session.append(make_prompt(9, 1))
