"""What holds for a model that sees patches, whatever its sizes: packing, padding, decoding, memory, meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.patches_world import one_row, sample
from tests.verbs import written
from vlmem_jax.config import ConfigError
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, Request, SamplingConfig
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings

IMAGE, TALL, VIDEO = PatchGrid(1, 3, 5), PatchGrid(1, 7, 2), PatchGrid(3, 2, 3, 0.7)
SHAPE = dict(pack_tokens=128, pack_tiles=80)
CLOSE = dict(atol=2e-5, rtol=2e-5)


PLAIN = [("tiny_qwen2_5_vl", "none"), ("tiny_qwen3_vl", "none")]


@pytest.fixture(scope="module", params=[*PLAIN, ("tiny_qwen2_5_vl", "comemo"), ("tiny_qwen3_vl", "comemo")], ids=str)
def vlm(request):
    preset, memory = request.param
    return VLM(resolve({"preset": preset, "memory": memory}))


@pytest.fixture(scope="module")
def params(vlm):
    params = drawn.params(vlm, 1)
    # biases start at 0, where they do nothing, and all tokens near 0, where attention hardly tells them apart
    params = jax.tree.map(lambda x: x if x.any() else x + 0.1, params)
    params["decoder"]["embed"] *= 10
    for name in ("q", "k"):
        params["decoder"]["layers"]["attn"][name]["kernel"] *= 3
    if vlm.config.memory_kind == "comemo":
        for gate in ("attn_gate", "mlp_gate"):
            params["memory"]["blocks"][gate] = jnp.full_like(params["memory"]["blocks"][gate], 0.7)
    return params


@pytest.fixture(scope="module")
def samples(vlm):
    """One image; a video and two images; text alone."""
    return [
        sample(vlm, [IMAGE], 9, seed=1),
        sample(vlm, [VIDEO, TALL, IMAGE], 11, seed=2),
        sample(vlm, [], 8, seed=3),
    ]


@pytest.fixture(scope="module")
def logits(vlm):
    return jax.jit(vlm.logits)


def packed(vlm, samples):
    return one_row(pack_row(samples, DataConfig(**SHAPE), vlm.tile))


def test_a_packed_sample_equals_that_sample_alone(vlm, params, logits, samples):
    """Rows of one shape: every sample goes through one program."""
    together, start = logits(params, packed(vlm, samples))[0], 0
    for one in samples:
        alone = logits(params, packed(vlm, [one]))[0]
        length = len(one.tokens_T)
        np.testing.assert_allclose(together[start : start + length], alone[:length], **CLOSE)
        start += length
    assert logits._cache_size() == 1


def test_positions_of_each_axis_matter(vlm, params, logits, samples):
    batch = packed(vlm, samples[:2])
    for axis in range(3):
        moved = batch.replace(positions_BT=batch.text.positions_BT.at[..., axis].multiply(2))
        assert np.abs(logits(params, moved) - logits(params, batch)).max() > 1e-3


@pytest.fixture(scope="module")
def engine(vlm, params):
    return Engine(Generator(vlm, params, stop_ids=[]), PoolShape(3, capacity=128, chunk=128, tiles=64).in_a_piece)


def test_decoding_with_the_cache_equals_reading_all_again(vlm, params, engine, logits, samples):
    handles = [engine.submit(Request(one, SamplingConfig(max_new_tokens=4))) for one in samples]
    for one, handle in zip(samples, handles, strict=True):
        answer, last = handle.result(), len(one.tokens_T) - 1
        scores = logits(params, packed(vlm, [written(one, answer)]))[0]
        assert len(answer) == 4 and scores[last : last + 4].argmax(-1).tolist() == answer


@pytest.mark.parametrize("vlm", PLAIN, indirect=True, ids=str)
def test_an_image_that_comes_late_is_seen_as_if_read_at_once(vlm, engine):
    """Behind an answer of one token."""
    how = SamplingConfig(max_new_tokens=1)
    before, second = sample(vlm, [IMAGE, VIDEO], 9, seed=1), sample(vlm, [TALL], 5, seed=4)
    begun = engine.submit(Request(before, how, keep=True))
    first = written(before, begun.result())
    at, tiles = first.positions_T.max() + 1, len(first.pixels_ISSc)
    index_T = np.where(second.visual_index_T < 0, -1, second.visual_index_T + tiles)
    moved = dataclasses.replace(
        second,
        positions_T=second.positions_T + at,
        visual_index_T=index_T.astype(np.int32),
        visual_positions_M=second.visual_positions_M + at,
        layout_I4=second.layout_I4 + np.array([tiles, tiles, 0, 0], np.int32),
    )
    names = [name for name, x in vars(first).items() if isinstance(x, np.ndarray)]
    joined = {name: np.concatenate([getattr(one, name) for one in (first, moved)]) for name in names}
    late = engine.submit(Request(second, how, after=begun, keep=True))
    at_once = engine.submit(Request(dataclasses.replace(first, **joined), how, keep=True))
    assert late.result() == at_once.result() and late.length == at_once.length
    np.testing.assert_allclose(late.logp, at_once.logp, **CLOSE)
    np.testing.assert_allclose(late.row.logits_BV, at_once.row.logits_BV, **CLOSE)
    assert late.row.decode.position_B == at_once.row.decode.position_B


def test_a_mesh_gives_the_same_numbers(vlm, params, logits, samples):
    config = DataConfig(**SHAPE)
    rows = [pack_row(part, config, vlm.tile) for part in (samples, samples[:2], samples[1:], samples[::2])]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, context=2, tensor=2))
    sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
    with jax.set_mesh(mesh):
        found = jax.jit(vlm.logits)(sharded, batch)
    np.testing.assert_allclose(found, logits(params, batch), **CLOSE)


@pytest.mark.parametrize("vlm", PLAIN, indirect=True, ids=str)
def test_recomputation_changes_no_gradient(vlm, params, samples):
    """Gradients of the tower that sees patches stay as they were; `test_vlm` has the other tower, and a memory."""
    batch = packed(vlm, samples)

    def gradient(policy):
        model = VLM(dataclasses.replace(vlm.config, remat=policy))
        return jax.jit(jax.grad(lambda params: (model.hidden(params, batch) ** 2).mean()))(params)

    plain = gradient("none")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain["vision"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4), plain, gradient("dots"))


def test_a_tied_head_is_the_token_table(vlm, params, logits, samples):
    batch = packed(vlm, samples)
    hidden = jax.jit(vlm.hidden)(params, batch)
    np.testing.assert_allclose(logits(params, batch), hidden @ params["decoder"]["embed"].T, **CLOSE)
    np.testing.assert_array_equal(vlm.head_kernel(params), params["decoder"]["embed"].T)
    assert "head" not in params["decoder"]


def test_a_cache_must_hold_the_prompts(vlm, params, samples):
    batch = pad_prompts(samples, 4, vlm.tile)
    with pytest.raises(ValueError, match=r"must hold the prompts of \d+ token slots, got a capacity of 7"):
        jax.eval_shape(lambda params, batch: vlm.prefill(params, batch, 7), params, batch)


def test_tiles_of_another_kind_are_refused(vlm, samples):
    wide = dataclasses.replace(samples[0], pixels_ISSc=samples[0].pixels_ISSc[..., :3])
    with pytest.raises(ValueError, match=r"but the prompt sample 1 has 15 tiles of \(2, 2, 3\)"):
        pad_prompts([wide], 1, vlm.tile)


def test_published_sizes():
    def count(name):
        parts = VLM(resolve({"preset": name})).abstract()
        return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in parts.items()}

    small, middle, large = (count(f"qwen2_5_vl_{name}") for name in ("3b", "7b", "72b"))
    assert (sum(small.values()), sum(middle.values()), sum(large.values())) == (
        3_754_622_976,
        8_292_166_656,
        73_410_777_344,
    )
    assert small["vision"] + small["projector"] == 668_684_288
    assert middle["decoder"] - 152064 * 3584 == 7_070_619_136


def test_bad_models_name_the_key():
    for changes, message in (
        (
            {"vision": {"kind": "clip"}},
            "config.model.vision.kind must be one of intern_vit, qwen_vit, qwen3_vit, siglip; got 'clip'",
        ),
        ({"vision": {"full_layers": (3,)}}, r"full_layers must name layers 0 to 2, got \(3,\)"),
        ({"vision": {"window": 7}}, "window must be at least patch_size [*] merge 8, got 7"),
        ({"vision": {"heads": 3}}, "width must be a multiple of 4 [*] heads 3, got 32"),
        ({"vision": {"image_size": 3}}, "unknown key config.model.vision.image_size"),
        ({"decoder": {"rope_sections": (2, 3, 4)}}, "three numbers that add up to head_dim / 2 = 8"),
        ({"decoder": {"rope_sections": ()}}, "rope_sections belong to a tower that places tokens on three axes"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve({"preset": "tiny_qwen2_5_vl", **changes})
    with pytest.raises(ValueError, match="memory.head_dim must be decoder.head_dim 16"):
        VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": {"kind": "comemo", "head_dim": 8}})).abstract()
