"""What holds for a model whatever its sizes: packing, gates, padding, depth, recomputation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from tests import drawn
from tests.verbs import embeddings
from vlmem_jax.config import ConfigError
from vlmem_jax.decoder.frequencies import of_rows
from vlmem_jax.families import PRESETS, resolve
from vlmem_jax.models import VLM
from vlmem_jax.nn.attention import causal_attention
from vlmem_jax.nn.rope import rotation
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.types import Batch


def with_open_gates(params, value=0.7):
    """Fresh gates are 0, where a memory block does nothing."""
    blocks = dict(params["memory"]["blocks"])
    blocks |= {gate: jnp.full_like(blocks[gate], value) for gate in ("attn_gate", "mlp_gate")}
    return params | {"memory": {"blocks": blocks}}


@pytest.fixture(scope="module")
def vlm():
    return VLM(resolve({"preset": "tiny"}))


@pytest.fixture(scope="module")
def params(vlm):
    return with_open_gates(drawn.params(vlm, 1))


@functools.cache
def compiled(vlm):
    return jax.jit(vlm.logits)


def logits(vlm, params, batch):
    return compiled(vlm)(params, batch)


def row(vlm, samples, T, I, seed=0):
    """A batch of one row holding `samples`, given as (text tokens, tiles); each starts with its tiles' placeholders."""
    P, size = vlm.tokens_per_tile, vlm.config.vision.image_size
    a = {
        "tokens_BT": np.zeros(T, np.int32),
        "positions_BT": np.zeros(T, np.int32),
        "segments_BT": np.zeros(T, np.int32),
        "visual_index_BT": np.full(T, -1, np.int32),
        "pixels_BISSc": np.zeros((I, size, size, 3), np.uint8),
        "positions_BM": np.zeros(I * P, np.int32),
        "segments_BM": np.zeros(I * P, np.int32),
    }
    t = tile = 0
    for number, (text, tiles, sample_seed) in enumerate(samples, 1):
        rng, n = np.random.default_rng(sample_seed), tiles * P
        span = slice(t, t + n + text)
        a["tokens_BT"][span] = rng.integers(5, 100, n + text)
        a["positions_BT"][span] = np.arange(n + text)
        a["segments_BT"][span] = number
        a["visual_index_BT"][t : t + n] = tile * P + np.arange(n)
        a["pixels_BISSc"][tile : tile + tiles] = rng.integers(0, 256, (tiles, size, size, 3))
        a["positions_BM"][tile * P : tile * P + n] = np.arange(n)
        a["segments_BM"][tile * P : tile * P + n] = number
        t, tile = t + n + text, tile + tiles
    a |= {"targets_BT": np.zeros(T, np.int32), "weights_BT": np.zeros(T, np.float32)}
    return Batch.of(**{key: jnp.asarray(value[None]) for key, value in a.items()})


FIRST, TEXT, LAST = (7, 2, 11), (9, 0, 12), (5, 1, 13)


def test_a_packed_sample_equals_that_sample_alone(vlm, params):
    together = logits(vlm, params, row(vlm, [FIRST, TEXT, LAST], 48, 4))[0]
    start = 0
    for text, tiles, seed in (FIRST, TEXT, LAST):
        length = text + tiles * vlm.tokens_per_tile
        alone = logits(vlm, params, row(vlm, [(text, tiles, seed)], 48, 4))[0]
        np.testing.assert_allclose(together[start : start + length], alone[:length], atol=1e-5)
        start += length


def test_a_neighbour_does_not_change_the_frequencies_of_dynamic_ntk(params):
    """They follow the sample's length, not the row's: one sample is longer than the trained range, one is not."""
    vlm = VLM(resolve({"preset": "tiny", "decoder": {"ntk_factor": 2.0, "max_positions": 16}}))
    short, long = (12, 0, 21), (30, 0, 22)
    together = logits(vlm, params, row(vlm, [short, long], 48, 0))[0]
    for sample, span in ((short, slice(0, 12)), (long, slice(12, 42))):
        alone = logits(vlm, params, row(vlm, [sample], 48, 0))[0]
        np.testing.assert_allclose(together[span], alone[: sample[0]], atol=1e-5)
    plain = logits(VLM(resolve({"preset": "tiny"})), params, row(vlm, [short, long], 48, 0))[0]
    np.testing.assert_allclose(together[:12], plain[:12], atol=1e-5)
    assert np.abs(together[12:42] - plain[12:42]).max() > 1e-3


def test_padding_tiles_and_tokens_change_nothing(vlm, params):
    short = logits(vlm, params, row(vlm, [FIRST], 20, 2))
    long = logits(vlm, params, row(vlm, [FIRST], 32, 5))
    length = FIRST[0] + FIRST[1] * vlm.tokens_per_tile
    np.testing.assert_allclose(short[0, :length], long[0, :length], atol=1e-5)


def test_with_closed_gates_the_model_is_the_plain_one(vlm, params):
    closed = with_open_gates(params, 0.0)
    plain = VLM(dataclasses.replace(vlm.config, memory=None))
    batch = row(vlm, [FIRST, LAST], 48, 4)
    without = {name: part for name, part in params.items() if name != "memory"}
    np.testing.assert_array_equal(logits(vlm, closed, batch), logits(plain, without, batch))
    assert not np.allclose(logits(vlm, params, batch), logits(plain, without, batch), atol=1e-3)


def test_shapes_name_no_mesh_whoever_asks_first():
    config = resolve({"preset": "tiny", "memory": {"kind": "none"}, "decoder": {"layers": 3}})  # nobody else's here
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        VLM(config).abstract()
    assert {leaf.sharding for leaf in jax.tree.leaves(VLM(config).abstract())} == {None}


def test_a_plain_model_has_no_memory_parameters_and_no_metrics(vlm, params):
    plain = VLM(dataclasses.replace(vlm.config, memory=None))
    assert set(vlm.abstract()) - set(plain.abstract()) == {"memory"}
    assert plain.metrics({name: part for name, part in params.items() if name != "memory"}) == {}
    gates = vlm.metrics(params)
    assert set(gates) == {"gate/attn/1", "gate/attn/3", "gate/mlp/1", "gate/mlp/3"}
    np.testing.assert_allclose(list(gates.values()), np.tanh(0.7), rtol=1e-6)


def test_without_images_the_program_is_that_of_a_plain_model(vlm, params):
    """As costly, and it gives the same numbers."""
    plain, batch = VLM(dataclasses.replace(vlm.config, memory=None)), row(vlm, [TEXT], 48, 0)
    without_memory = {name: part for name, part in params.items() if name != "memory"}

    def program(vlm, params):
        compiled = jax.jit(vlm.logits).lower(params, batch).compile()
        cost = compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
        return cost, compiled(params, batch)

    (cost, scores), (plain_cost, plain_scores) = program(vlm, params), program(plain, without_memory)
    assert cost == plain_cost
    np.testing.assert_array_equal(scores, plain_scores)


def test_a_sample_without_memory_skips_the_whole_block(vlm, params):
    """Also its MLP: a text-only sample in a mixed row equals the plain model's answer to it."""
    plain = VLM(dataclasses.replace(vlm.config, memory=None))
    without = {name: part for name, part in params.items() if name != "memory"}
    mixed = logits(vlm, params, row(vlm, [FIRST, TEXT], 48, 4))[0]
    start = FIRST[0] + FIRST[1] * vlm.tokens_per_tile
    alone = logits(plain, without, row(vlm, [TEXT], 48, 0))[0]
    np.testing.assert_allclose(mixed[start : start + TEXT[0]], alone[: TEXT[0]], atol=1e-5)


def test_memory_is_not_causal(vlm, params):
    """A token before an image reads it through the memory, though not through self-attention."""
    batch = row(vlm, [FIRST], 48, 4)
    text_first = batch.replace(visual_index_BT=jnp.roll(batch.text.visual_index_BT, FIRST[0], axis=1))
    dark = text_first.replace(pixels_BISSc=jnp.zeros_like(text_first.views.pixels_BISSc))
    moved = np.abs(logits(vlm, params, text_first) - logits(vlm, params, dark))[0].max(axis=-1)
    assert moved[: FIRST[0]].min() > 1e-4
    closed = with_open_gates(params, 0.0)
    still = np.abs(logits(vlm, closed, text_first) - logits(vlm, closed, dark))[0].max(axis=-1)
    assert still[: FIRST[0]].max() == 0


@pytest.mark.parametrize("layers, every", [(4, 1), (5, 2), (5, 4)])
def test_scanned_groups_equal_a_plain_loop(layers, every):
    config = resolve({"preset": "tiny", "decoder": {"layers": layers}, "memory": {"kind": "comemo", "every": every}})
    vlm = VLM(config)
    params = with_open_gates(drawn.params(vlm, 2))
    batch = row(vlm, [FIRST, LAST], 48, 4)

    @jax.jit
    def plain_loop(params):
        modules = vlm._merge(params)
        visual = vlm.see(params, batch.views)
        seen_by = modules.memory.attend(visual, batch.text.positions_BT, batch.text.segments_BT)
        x = embeddings(vlm, params, batch)
        tables = rotation(batch.text.positions_BT, of_rows(vlm.config.decoder, batch.text.segments_BT))
        graph, states = nnx.split(modules.decoder.layers)

        def core(q, k, v, tables):
            return causal_attention(q, k, v, batch.text.segments_BT, tables), None

        for number in range(layers):
            if (number + 1) % every == 0:
                x = seen_by.apply(jax.tree.map(lambda leaf, n=number: leaf[n // every], seen_by.xs), x)
            layer = nnx.merge(graph, jax.tree.map(lambda leaf, n=number: leaf[n], states))
            x, _ = layer(x, tables, core)
        return modules.decoder.logits(modules.decoder.norm(x))

    np.testing.assert_allclose(logits(vlm, params, batch), plain_loop(params), atol=1e-5)


@pytest.fixture(scope="module")
def gradient(vlm, params):
    """The gradient, as a function of what is recomputed."""
    batch = row(vlm, [FIRST, LAST], 48, 4)

    @functools.cache
    def compute(policy):
        model = VLM(dataclasses.replace(vlm.config, remat=policy))
        return jax.jit(jax.grad(lambda params: (model.hidden(params, batch) ** 2).mean()))(params)

    return compute


@pytest.mark.parametrize("policy", ["full", "attention", "dots", "offload"])
def test_recomputation_changes_no_gradient(gradient, policy):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), gradient("none"), gradient(policy))


def test_drop_path_depends_on_the_key_and_not_on_a_rate_of_zero(vlm, params):
    views = row(vlm, [FIRST], 48, 4).views
    dropping = VLM(dataclasses.replace(vlm.config, vision=dataclasses.replace(vlm.config.vision, drop_path=0.5)))
    drop, keep = (jax.jit(lambda *given, see=model.see: see(*given).tokens_BMD) for model in (dropping, vlm))
    first, second = (drop(params, views, jax.random.key(n)) for n in range(2))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(drop(params, views), keep(params, views))
    np.testing.assert_array_equal(keep(params, views, jax.random.key(0)), keep(params, views))


def test_half_precision_stays_near_full_precision(vlm, params):
    batch = row(vlm, [FIRST, LAST], 48, 4)
    half = VLM(dataclasses.replace(vlm.config, compute_dtype="bfloat16"))
    assert jax.eval_shape(half.hidden, params, batch).dtype == jnp.bfloat16
    assert logits(half, params, batch).dtype == jnp.float32
    np.testing.assert_allclose(logits(half, params, batch), logits(vlm, params, batch), atol=0.15)


def test_published_sizes():
    def count(name, part):
        return sum(leaf.size for leaf in jax.tree.leaves(VLM(resolve({"preset": name})).abstract()[part]))

    for name in PRESETS:
        VLM(resolve({"preset": name})).axes()
    assert count("comemo_2b", "decoder") == 1_889_146_880  # InternLM2-1.8B with 9 more tokens
    assert count("comemo_2b", "vision") == 304_012_288  # InternViT-300M
    assert count("comemo_9b", "decoder") == 7_737_782_272


def test_bad_models_name_the_key():
    for config, message in (
        ({"preset": "comemo_3b"}, "config.model.preset must be one of comemo_2b"),
        ({"preset": "tiny", "comemo": {"every": 2}}, "config.model.comemo is no key any more: .* config.model.memory"),
        ({"preset": "tiny", "memory": "comemoo"}, "config.model.memory.kind must be one of comemo, vismem"),
        (
            {"preset": "tiny", "decoder": {"kv_heads": 3}},
            "config.model.decoder.*heads must be a multiple of kv_heads 3",
        ),
        ({"preset": "tiny", "decoder": {"layer": 3}}, "layers"),
        ({"preset": "tiny", "vision": {"image_size": 30}}, "image_size must be a multiple of patch_size 7"),
        ({"preset": "tiny", "remat": "some"}, "remat must be one of none, full, attention, dots"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(config)
    with pytest.raises(ValueError, match="memory.every must be at most decoder.layers 4, got 9"):
        VLM(resolve({"preset": "tiny", "memory": {"kind": "comemo", "every": 9}})).abstract()


def test_a_config_changes_single_keys_of_a_preset():
    changes = {"preset": "tiny", "decoder": {"layers": 6}, "memory": None}
    for config in (changes, ConfigDict(changes)):
        changed = resolve(config)
        assert changed.decoder == dataclasses.replace(resolve({"preset": "tiny"}).decoder, layers=6)
        assert changed.memory is None
