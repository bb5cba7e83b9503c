"""VisMem's short memories where the last layers of the vision tower form them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.memory.vismem_world import ROWS, RULE, SAMPLED, normal
from tests.verbs import embeddings
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.generate import Generator
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.runtime.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from vlmem_jax.types import FormationInputs
from vlmem_jax.vision import normalise


@pytest.fixture(scope="module")
def seeing(vlm, params):
    """The model with that former, from the second of three layers on, where frames are more than a window."""
    config = dataclasses.replace(vlm.config.memory, former="lora_vision", vision_layer=1)
    model = VLM(dataclasses.replace(vlm.config, memory=config))
    short = drawn.params(model, 4)["memory"]["short"]
    short["m_init"] *= 50
    for n, target in enumerate("qv"):
        short["lora"][target]["b"] = normal(n, short["lora"][target]["b"].shape)
    return model, params | {"memory": params["memory"] | {"short": short}}


def patches(model, params, batch):
    """The patches that short memories are formed from, and their rotations."""
    c, vision = model.config.vision, model._merge(params).vision
    pixels = normalise(batch.views.pixels_BISSc, c.channels(c.pixel_mean), c.channels(c.pixel_std), jnp.float32)
    kept_BND = vision.keeping(pixels, batch.views.layout_BI4, model.config.memory.vision_layer, "none")[1]
    return kept_BND, vision.rotation(batch.views.layout_BI4[..., 2:])


def spelt_out(model, params, layout_I4, kept_ND, tables, rows_ED):
    """What rows behind the patches of a prompt become, in numpy: all scores, all masks."""
    c, first, memory = model.config.vision, model.config.memory.vision_layer, model.config.memory
    cos, sin = (table[:, None] for table in tables)
    windows, frames = (np.repeat(layout_I4[:, n], c.merge**2) for n in range(2))
    layers, lora = jax.device_get((params["vision"]["layers"], params["memory"]["short"]["lora"]))
    x, N = np.concatenate([kept_ND, rows_ED]), len(frames)

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * scale

    def turned(x):
        left, right = np.split(x[:N], 2, axis=-1)
        return np.concatenate([np.concatenate([left * cos - right * sin, right * cos + left * sin], -1), x[N:]])

    for n in range(first, c.layers):
        layer = jax.tree.map(lambda leaf, n=n: leaf[n], layers)
        ids = frames if n in c.full_layers else windows
        allowed = np.zeros((len(x), len(x)), bool)
        allowed[:N, :N] = ids[:, None] == ids
        allowed[N:, :N], allowed[N:, N:] = frames > 0, True
        y = rms(x, layer["norm1"]["scale"])
        kernel, bias = layer["attn"]["qkv"]["kernel"], layer["attn"]["qkv"]["bias"]
        q, k, v = (np.einsum("nd,dhc->nhc", y, kernel[:, m]) + bias[m] for m in range(3))
        low = {t: y @ lora[t]["a"][n - first] @ lora[t]["b"][n - first] * memory.lora.scale for t in "qv"}
        q, k, v = turned(q + low["q"].reshape(q.shape)), turned(k), v + low["v"].reshape(v.shape)
        scores = np.where(allowed, np.einsum("nhc,mhc->hnm", q, k) / q.shape[-1] ** 0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hnm,mhc->nhc", weights / weights.sum(-1, keepdims=True), v)
        x = x + np.einsum("nhc,hcd->nd", out, layer["attn"]["proj"]["kernel"]) + layer["attn"]["proj"]["bias"]
        y, mlp = rms(x, layer["norm2"]["scale"]), layer["mlp"]
        gate, up = (y @ mlp[name]["kernel"] + mlp[name]["bias"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    return x[N:]


@pytest.fixture(scope="module")
def formed(seeing, prompts):
    """Short and long memories of all prompts after prefill, and from what they were formed."""
    model, params = seeing
    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, model.tile))
    _, state = jax.jit(model.prefill, static_argnums=2)(params, batch, 96)
    form, rows = jax.jit(model.form, static_argnums=4), jnp.arange(ROWS)
    (short, heard), (long, _) = (form(params, state, rows, jnp.full(ROWS, kind), 64) for kind in range(2))
    return short[:, : model.config.memory.short_len], long, heard


def test_the_vision_tower_forms_short_memories(seeing, prompts, formed):
    """For each row whatever stands beside it, as spelt out; zeros without images."""
    (model, params), (short, _, heard) = seeing, formed
    memory, out = params["memory"]["short"], model.config.memory.short_len * model.config.vision.merge**2

    @jax.jit
    def queried(params, heard):
        own = model._merge(params).memory
        return own.short.query(own.query_builder(heard.states_BJLD[:, 0], heard.lengths_BJ[:, 0]))

    project = jax.jit(lambda params, x: model._merge(params).projector(x))
    batch = pad_prompts(prompts, ROWS, model.tile)
    kept_BND, tables, queries = jax.device_get(
        (*jax.jit(functools.partial(patches, model))(params, batch), queried(params, heard))
    )
    wanted = []
    for row, prompt in enumerate(prompts):
        if not len(prompt.pixels_ISSc):
            assert not short[row].any()
            continue
        extra, own = np.concatenate([queries[row], memory["m_init"]]), [table[row] for table in tables]
        rows = spelt_out(model, params, batch.views.layout_BI4[row], kept_BND[row], own, extra)
        wanted.append(project(params, rows[None, -out:])[0])
        np.testing.assert_allclose(short[row], wanted[-1], atol=2e-4)
        assert np.abs(wanted[-1] - wanted[0]).max() > 0.01 or row == 0


def test_in_a_packed_row_it_sees_the_images_of_its_own_sample(seeing, prompts, formed):
    """In training, where one row holds several samples and several calls of both kinds."""
    (model, params), (short, long, heard) = seeing, formed
    slots, calls = model.speech.latents, [(0, 0), (0, 1), (2, 0), (1, 0), (2, 0)]  # of a prompt, a kind
    samples = [
        dataclasses.replace(
            prompts[n],
            tokens_T=np.append(prompts[n].tokens_T, np.zeros(4 * slots, np.int32)),
            labels_T=np.append(prompts[n].labels_T, np.full(4 * slots, -100, np.int32)),
            positions_T=np.concatenate([prompts[n].positions_T, np.zeros((4 * slots, 3), np.int32)]),
            visual_index_T=np.append(prompts[n].visual_index_T, np.full(4 * slots, -1, np.int32)),
        )
        for n in range(3)
    ]
    row = pack_row(samples, DataConfig(), model.tile, 160, 48)
    M, J, ends = row.views.segments_BM.shape[0], 8, np.cumsum([len(s.tokens_T) for s in samples])
    states, lengths, kinds = np.zeros((J, *heard.states_BJLD.shape[2:]), np.float32), np.zeros(J), np.full(J, -1)
    places = []
    for j, (n, kind) in enumerate(calls):
        states[j], lengths[j], kinds[j] = heard.states_BJLD[n, 0], heard.lengths_BJ[n, 0], kind
        before = sum(m == n for m, _ in calls[:j])
        places.append(ends[n] - (before + 1) * slots + np.arange(model.speech.lengths[kind]))
        row.text.visual_index_BT[places[-1]] = M + j * slots + np.arange(len(places[-1]))
    batch = row.replace(formation=FormationInputs(states, lengths.astype(np.int32), kinds.astype(np.int32)))

    [x_TD] = jax.jit(functools.partial(embeddings, model))(params, jax.tree.map(lambda x: x[None], batch))
    for place, (n, kind) in zip(places, calls, strict=True):
        np.testing.assert_allclose(x_TD[place], (short, long)[kind][n, : len(place)], atol=2e-4)


def test_seeing_again_costs_a_model_that_never_calls_nothing_but_room(answers, seeing, vlm, params, plain, prompts):
    """Its scores are the plain model's, bit by bit; other formers keep no patches."""
    model, own = seeing
    batch = jax.tree.map(jnp.asarray, pad_prompts(prompts, ROWS, vlm.tile))
    ordinary = np.setdiff1d(np.arange(vlm.config.decoder.vocab), vlm.config.memory.token_ids)
    scores, plain_scores = jax.jit(model.logits)(own, batch), jax.jit(plain[0].logits)(plain[1], batch)
    np.testing.assert_array_equal(scores[..., ordinary], plain_scores[..., ordinary])
    kept = [
        jax.eval_shape(lambda params, m=m: m.prefill(params, batch, 96)[1], p).memory.patches
        for m, p in ((vlm, params), (model, own))
    ]
    assert kept[0] is None and kept[1].x_BNE.shape[1] == batch.views.pixels_BISSc.shape[1] * vlm.config.vision.merge**2


def test_rows_that_see_again_are_apart(answers, seeing, prompts, forced):
    """In a batch, and as one of two answers to a prompt that was read once."""
    generator, keys = Generator(*seeing, stop_ids=[]), list(range(ROWS))
    together = answers(prompts, SAMPLED, RULE, forced, keys, generator=generator)
    for row in (0, 3):
        key, given = keys[row : row + 1], forced[row : row + 1]
        [alone] = answers([prompts[row]], SAMPLED, RULE, given, key, generator=generator)
        assert alone.tokens == together[row].tokens
        np.testing.assert_allclose(alone.logp, together[row].logp, atol=1e-5)
    for n in range(2):
        for handle in alone._engine.fork([together[n].request] * 2):
            handle.result()
            assert handle.tokens == together[n].tokens


@pytest.mark.slow
def test_eight_devices_see_again_what_one_sees(seeing, prompts, formed):
    """Memories of both kinds in a training forward, and their gradients."""
    (model, params), (_, _, heard) = seeing, formed
    batch, kinds = pad_prompts(prompts, ROWS, model.tile), np.array([[0], [1], [0], [0]], np.int32)
    for row, prompt in enumerate(prompts):
        N, length = model.speech.lengths[kinds[row, 0]], len(prompt.tokens_T)
        batch.text.visual_index_BT[row, length - N : length] = batch.views.segments_BM.shape[1] + np.arange(N)
    batch = batch.replace(formation=dataclasses.replace(heard, kinds_BJ=kinds))

    def loss(memory, params, batch):
        x_BTD = embeddings(model, params | {"memory": memory}, batch)
        return ((x_BTD * (batch.text.segments_BT > 0)[..., None]) ** 2).mean(), x_BTD

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, one), gradient = step(params["memory"], params, jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, model.abstract(), model.axes()))
        (_, many), other = step(sharded["memory"], sharded, jax.device_put(batch, batch_sharding(mesh)))
    real = batch.text.segments_BT > 0
    np.testing.assert_allclose(np.asarray(many)[real], np.asarray(one)[real], atol=1e-4)
    assert np.abs(gradient["short"]["query"]["kernel"]).max() > 1e-6
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(gradient["short"]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * scale), gradient, other)
