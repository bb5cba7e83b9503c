"""A model under a context budget: means stand in its text, its memory reads all."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests import drawn
from tests.models.test_vlm import with_open_gates
from tests.patches_world import save_tokenizer
from tests.processing.conftest import save_char_tokenizer
from tests.verbs import embeddings
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.families import of_model, resolve
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.processing import Tokenizer, make_processor
from vlmem_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from vlmem_jax.types import Text

FAMILIES = {"tiny": ("thumbnail", "pooled:3"), "tiny_qwen2_5_vl": ("pooled:2",), "tiny_qwen3_vl": ("pooled:2",)}
CASES = [(preset, context) for preset, contexts in FAMILIES.items() for context in contexts]
SMALL = {"min_pixels": 64, "max_pixels": 2048}
IMAGE = {"tiny": {"max_tiles": 4, "dhr_map": "fine"}, "tiny_qwen2_5_vl": SMALL, "tiny_qwen3_vl": SMALL}
SAVE = {"tiny": save_char_tokenizer, "tiny_qwen2_5_vl": save_tokenizer, "tiny_qwen3_vl": save_tokenizer}
TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes."}]
DATA = DataConfig(pack_tokens=160, pack_tiles=64, loss_weight="token")


@functools.cache
def model(preset, memory="comemo"):
    """A VLM and its parameters; those of the plain one are a part of the others."""
    vlm = VLM(resolve({"preset": preset, "memory": memory, "decoder": {"layers": 2, "vocab": 192}}))
    if memory is None:
        return vlm, {name: part for name, part in model(preset)[1].items() if name != "memory"}
    return vlm, with_open_gates(drawn.params(vlm, 1))


@functools.cache
def compiled(vlm):
    return jax.jit(vlm.logits)


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """`read(preset, context, memory)`: the processor of a model."""

    @functools.cache
    def read(preset, context, whole=True, **changes):
        folder = tmp_path_factory.mktemp("tokenizer")
        SAVE[preset](folder)
        vlm, _ = model(preset)
        family = of_model(vlm.config)
        image = family.image(context=context, **{**IMAGE[preset], **changes})
        return make_processor(Tokenizer.load(folder), image, vlm.config.vision.geometry, "s", family.template, whole)

    return read


def picture(size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise)


def samples(processor):
    wide, tall = (picture(size, seed) for seed, size in enumerate([(56, 28), (24, 60)]))
    return [processor.encode(TALK, [wide]), processor.encode(TALK, [tall])]


def row(processor, chosen):
    return jax.tree.map(lambda x: jnp.asarray(x[None]), pack_row(chosen, DATA, processor.tile))


@pytest.mark.parametrize(("preset", "context"), CASES)
def test_what_stands_in_the_text_are_the_tokens_or_their_means(read, preset, context):
    (vlm, params), processor = model(preset), read(preset, context)
    batch = row(processor, samples(processor))
    visual = jax.jit(vlm.see)(params, batch.views)
    tokens_MD, index_T = np.asarray(visual.tokens_BMD[0]), np.asarray(batch.text.visual_index_BT[0])
    wanted_MD = tokens_MD
    if processor.tile.pooled:
        pool_M = np.asarray(batch.views.pool_BM[0])
        whole = {n: tokens_MD[pool_M == n].mean(0) for n in sorted(set(pool_M[pool_M >= 0].tolist()))}
        assert len(whole) == (index_T >= 0).sum() < (pool_M >= 0).sum()
        wanted_MD = np.stack([whole.get(n, 0 * tokens_MD[0]) for n in range(pool_M.max() + 1)])
    else:
        assert visual.means_BMD is None
    x_TD = np.asarray(embeddings(vlm, params, batch)[0])
    np.testing.assert_allclose(x_TD[index_T >= 0], wanted_MD[index_T[index_T >= 0]], atol=1e-6)


@pytest.mark.parametrize(("preset", "context"), CASES)
def test_a_packed_sample_equals_that_sample_alone(read, preset, context):
    (vlm, params), processor = model(preset), read(preset, context)
    both = samples(processor)
    together, start = compiled(vlm)(params, row(processor, both))[0], 0
    for sample in both:
        alone = compiled(vlm)(params, row(processor, [sample]))[0, : len(sample.tokens_T)]
        np.testing.assert_allclose(together[start : start + len(alone)], alone, atol=1e-5)
        start += len(alone)


@pytest.mark.parametrize(("preset", "context"), [("tiny", "thumbnail"), ("tiny_qwen2_5_vl", "pooled:2")])
def test_a_memory_reads_what_does_not_stand_in_the_sequence(read, preset, context):
    """And a model without one does not, whose tower need not even see it."""
    processor, plainly = read(preset, context), read(preset, context, whole=False)
    sample = samples(processor)[0]
    hidden = sample.pixels_ISSc.copy()
    if processor.tile.pooled:  # two visual tokens change places within their mean
        first, second = np.flatnonzero(sample.pool_M == 0)[:2]
        hidden[[first, second]] = hidden[[second, first]]
    else:
        hidden[0] = 255 - hidden[0]
    changed = dataclasses.replace(sample, pixels_ISSc=hidden)
    with_memory, without = model(preset), model(preset, None)
    assert with_memory[0].reads_beyond and not without[0].reads_beyond

    def logits(of, processor, sample):
        vlm, params = of
        return np.asarray(compiled(vlm)(params, row(processor, [sample]))[0, : len(sample.tokens_T)])

    seen, other = (logits(with_memory, processor, one) for one in (sample, changed))
    assert np.abs(seen - other).max() > 1e-3
    unread = logits(without, processor, sample)
    if not processor.tile.pooled:  # in a tower of patches, those beside each other see each other
        np.testing.assert_array_equal(unread, logits(without, processor, changed))
    np.testing.assert_allclose(logits(without, plainly, samples(plainly)[0]), unread, atol=1e-5)


@pytest.mark.parametrize(("preset", "context"), CASES)
def test_a_prompt_that_goes_on_token_by_token_is_read_as_at_once(read, preset, context):
    (vlm, params), processor = model(preset), read(preset, context)
    sample = samples(processor)[0]
    T = len(sample.tokens_T)
    whole = np.asarray(compiled(vlm)(params, row(processor, [sample]))[0, :T])
    start = dataclasses.replace(
        sample,
        **{name: getattr(sample, name)[: T - 2] for name in ("tokens_T", "labels_T", "positions_T", "visual_index_T")},
    )
    batch = jax.tree.map(jnp.asarray, pad_prompts([start], 1, processor.tile))
    logits_BV, state = jax.jit(vlm.prefill, static_argnums=2)(params, batch, 2 * batch.text.tokens_BT.shape[1])
    np.testing.assert_allclose(logits_BV[0], whole[T - 3], atol=1e-5)

    @jax.jit
    def step(params, state, token):
        hidden_BD, state = vlm.extend(params, state, Text.first(token[None, None], jnp.ones(1, jnp.int32)))
        return vlm.score(params, hidden_BD), state

    for t in (T - 2, T - 1):
        logits_BV, state = step(params, state, jnp.asarray(sample.tokens_T[t]))
        np.testing.assert_allclose(logits_BV[0], whole[t], atol=1e-5)


@pytest.mark.parametrize(("preset", "context"), CASES)
def test_split_tokens_and_tiles_have_the_means_of_whole_ones(read, preset, context):
    vlm, params = model(preset)
    processor = read(preset, context)
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *(row(processor, [one]) for one in samples(processor)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
        found = jax.jit(vlm.logits)(placed, jax.device_put(jax.device_get(batch), batch_sharding(mesh)))
    real = np.asarray(batch.text.segments_BT) > 0
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(compiled(vlm)(params, batch))[real], atol=3e-4)


def test_nothing_of_a_budget_is_in_the_program_without_one(read):
    """The batch has the leaves that it had, so the program is the one that it was."""
    for preset, changes in {"tiny": {"dhr_map": "raster"}, "tiny_qwen2_5_vl": {}}.items():
        processor, (vlm, params) = read(preset, "all", **changes), model(preset)
        views = row(processor, samples(processor)).views
        assert views.pool_BM is None and views.places == 1
        visual = jax.eval_shape(vlm.see, params, views)
        assert visual.means_BMD is None and visual.places == 1
