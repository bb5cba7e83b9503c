"""What VisMem's memories are formed from: all visual tokens under a budget of context, and states of any size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests import drawn
from tests.patches_world import save_tokenizer
from vlmem_jax.families import of_model, resolve
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.memory.vismem.config import VisMemConfig
from vlmem_jax.memory.vismem.latent import QueryBuilder
from vlmem_jax.models import VLM
from vlmem_jax.nn.encoder import EncoderConfig
from vlmem_jax.processing import Tokenizer, make_processor

WIDTH = 16
BUILDER = VisMemConfig(query_len=3, query_builder=EncoderConfig(layers=1, heads=2, ff_mult=2), max_positions=64,
                       max_visual_hidden=8, max_prompt_hidden=8)  # fmt: skip


def model(states):
    memory = {"kind": "vismem", "visual_states": states, "token_ids": (156, 157, 158, 159)}
    return VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": memory, "decoder": {"layers": 2}}))


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """`observed(states, context)`: what is kept of a picture, and its visual tokens."""
    folder = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)

    def observed(states, context):
        vlm = model(states)
        params, family = drawn.params(vlm, 1), of_model(vlm.config)
        image = family.image(context=context, min_pixels=64, max_pixels=2048)
        geometry, read = vlm.config.vision.geometry, ("s", family.template, vlm.reads_beyond)
        processor = make_processor(Tokenizer.load(folder, vlm.special_tokens), image, geometry, *read)
        batch = pad_prompts([processor.prompt([Image.fromarray(noise), "What?"])], 1, processor.tile)
        _, state = jax.jit(vlm.prefill, static_argnames="capacity")(params, batch, capacity=128)
        return state.memory, jax.jit(vlm.see)(params, batch.views)

    return observed


def test_under_a_budget_all_visual_tokens_are_heard(observed):
    (cut, seen), (whole, _) = observed("all", "pooled:2"), observed("all", "all")
    [count] = (np.asarray(seen.segments_BM) > 0).sum(-1)
    assert int(cut.visual_length_B[0]) == int(whole.visual_length_B[0]) == count > 4
    np.testing.assert_array_equal(cut.visual_BYD[0, :count], seen.tokens_BMD[0, :count])
    np.testing.assert_allclose(cut.visual_BYD[0, :count], whole.visual_BYD[0, :count], atol=1e-6)
    means, _ = observed("vision_encoder", "pooled:2")
    assert int(means.visual_length_B[0]) < count


def test_without_a_budget_they_are_those_of_the_sequence(observed):
    (all_of_them, _), (standing, _) = observed("all", "all"), observed("vision_encoder", "all")
    np.testing.assert_array_equal(all_of_them.visual_length_B, standing.visual_length_B)
    one, other = (np.asarray(state.visual_BYD[0]) for state in (all_of_them, standing))
    np.testing.assert_allclose(one[one[:, 0].argsort()], other[other[:, 0].argsort()], atol=1e-5)  # in two orders
    np.testing.assert_allclose(all_of_them.last_BD, standing.last_BD, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
def test_normed_states_may_have_any_size(normed):
    builder = QueryBuilder(dataclasses.replace(BUILDER, normed_states=normed), WIDTH, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    small, large = (np.asarray(builder(states * size, jnp.array([5, 3]))) for size in (1.0, 50.0))
    assert np.allclose(small, large, atol=1e-4) == normed
    exchanged = builder((states * 50.0)[:, jnp.array([1, 0, 2, 3, 4])], jnp.array([5, 3]))
    moved = np.abs(np.asarray(exchanged) - large).max()
    assert moved > 1e-3 if normed else moved < 2e-3  # which state is which is lost beside large ones


def test_positions_and_queries_start_as_large_as_they_are_to():
    for std in (0.02, 0.5):
        builder = QueryBuilder(dataclasses.replace(BUILDER, position_std=std), WIDTH, rngs=nnx.Rngs(0))
        assert np.std(builder.pos_emb[...]) == pytest.approx(std, rel=0.1)
        assert np.std(builder.q_init[...]) == pytest.approx(std, rel=0.3)
