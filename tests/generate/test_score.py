"""How probable it is what might be said: behind rows with a cache, and behind packed rows without."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.verbs import written
from vlmem_jax.generate import Generator, SamplingConfig, score
from vlmem_jax.generate.engine import Engine
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.generate.requests import Request
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings

GREEDY = SamplingConfig(max_new_tokens=5)
BANNED = [17]
PER_TOKEN = "tokens_T", "positions_T", "visual_index_T", "labels_T"


@pytest.fixture(scope="module")
def engine(vlm, params):
    generator = Generator(vlm, params, stop_ids=[], banned_ids=BANNED)
    return Engine(generator, PoolShape(slots=2, capacity=96, chunk=32, tiles=3, forced=1))


@pytest.fixture(scope="module")
def prompts(make_prompt):
    return [make_prompt(9, 1, 0), make_prompt(60, 0, 1), make_prompt(14, 2, 2), make_prompt(5, 0, 3)]


def test_continuations_are_scored_as_if_they_had_been_drawn(vlm, params, engine, prompts):
    prompt, given = prompts[0], [[7, 8, 9], [20], [30, 31], [7, 8], [7, 8, 10]]
    handle = engine.submit(Request(prompt, GREEDY, keep=True))
    handle.result()
    found = engine.score(handle, given)
    wholes = [written(prompt, handle.tokens + ids) for ids in given]
    logits_BTV = jax.jit(vlm.logits)(params, pad_prompts(wholes, len(wholes), vlm.tile))
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV.at[:, :, np.array(BANNED)].set(-np.inf)))
    for row, (ids, logp_T) in enumerate(zip(given, found, strict=True)):
        start = len(wholes[row].tokens_T) - len(ids)
        expected = [logp_BTV[row, start + n - 1, token] for n, token in enumerate(ids)]
        np.testing.assert_allclose(logp_T, expected, atol=1e-5)
    assert engine.score(handle, given)[0].tolist() == found[0].tolist(), "it changes nothing"


def test_continuations_have_the_scores_of_the_sampler(engine, prompts):
    """While an answer is written, too, which goes on undisturbed."""
    request = Request(prompts[2], SamplingConfig(max_new_tokens=8, temperature=1.0))
    drawn = engine.submit(request)
    drawn.result()
    begun = engine.submit(request)
    while len(begun.tokens) < 2:
        engine.step()
    came = len(begun.tokens) + len(engine._late)
    assert came < 8
    [logp_T] = engine.score(begun, [drawn.tokens[came:]])
    np.testing.assert_allclose(logp_T, drawn.logp[came:], atol=1e-5)
    assert begun.result() == drawn.tokens


def test_both_forms_agree(engine, prompts):
    labels = [5, 40, 63]
    packed_NK, mass_N = engine.labels(prompts, labels)
    assert engine.score(prompts, labels).tolist() == packed_NK.tolist()
    np.testing.assert_allclose(np.exp(packed_NK).sum(-1), 1, atol=1e-6)
    for prompt, packed_K, mass in zip(prompts, packed_NK, mass_N, strict=True):
        np.testing.assert_allclose(engine.score([prompt], labels)[0], packed_K, atol=1e-5)
        *begin, last = prompt.tokens_T.tolist()
        cut = {name: getattr(prompt, name)[: len(begin)] for name in PER_TOKEN}
        request = Request(
            dataclasses.replace(prompt, **cut), SamplingConfig(max_new_tokens=1), forced=[last], keep=True
        )
        handle = engine.submit(request)
        handle.result()
        cached_K = np.concatenate(engine.score(handle, [[label] for label in labels]))
        np.testing.assert_allclose(jax.nn.log_softmax(cached_K), packed_K, atol=1e-5)
        np.testing.assert_allclose(cached_K - packed_K, np.full(len(labels), mass), atol=1e-5)


def test_more_samples_than_are_scored_at_once(engine, make_prompt, monkeypatch):
    """Those of a row that is full of short ones."""
    many = [make_prompt(6, 0, seed) for seed in range(5)]
    together = engine.labels(many, [5, 40])
    monkeypatch.setattr(score, "ENDS", 2)
    for found, expected in zip(engine.labels(many, [5, 40]), together, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_devices_that_split_rows_score_a_pack_each(vlm, params, engine, make_prompt):
    prompts = [make_prompt(50, 0, 0), make_prompt(60, 1, 1), make_prompt(14, 2, 2)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
    generator = Generator(vlm, sharded, stop_ids=[], banned_ids=BANNED, mesh=mesh)
    found = Engine(generator, engine.shape).labels(prompts, [5, 40, 63])
    for one, other in zip(found, engine.labels(prompts, [5, 40, 63]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_banned_ids_have_no_part_of_the_mass_but_as_labels(engine, prompts):
    everything = [n for n in range(engine.vlm.config.decoder.vocab) if n not in BANNED]
    np.testing.assert_allclose(engine.labels(prompts, everything).mass_N, 0, atol=1e-5)
    few, more = (engine.labels(prompts, [5, *of]).mass_N for of in ([], BANNED))
    assert (few < more).all() and (more < 0).all()


def test_what_has_no_score_is_refused(engine, prompts, make_prompt):
    with pytest.raises(ValueError, match="sample prompt 9 has 97 tokens and 0 tiles, but a row of the engine has room"):
        engine.score([*prompts, make_prompt(97, 0, 9)], [1, 2])
    with pytest.raises(ValueError, match="labels must be 1 to 512 ids"):
        engine.score(prompts, range(513))
    handle = engine.submit(Request(prompts[0], GREEDY, keep=True))
    with pytest.raises(ValueError, match="while it is written, or where it was kept"):
        engine.score(handle, [[1]])
    handle.result()
    with pytest.raises(ValueError, match="a continuation must have 1 to"):
        engine.score(handle, [[1], []])
