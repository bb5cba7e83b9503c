"""A model sees what prompts show once, and answers as one that sees it each time."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import drawn
from tests.patches_world import sample
from vlmem_jax.evals.measure import compilations
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, Request, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

GREEDY = SamplingConfig(max_new_tokens=4)
LABELS = [7, 8, 30]
A, B, C = PatchGrid(1, 3, 4), PatchGrid(1, 2, 2), PatchGrid(2, 2, 3)


def of(vlm, shape):
    return Engine(Generator(vlm, drawn.params(vlm), stop_ids=[]), shape)


@pytest.fixture(scope="module", params=["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def engines(request):
    """One that keeps features, and one that does not; of models that see frames, with and without deeper layers."""
    vlm = VLM(resolve({"preset": request.param, "decoder": {"layers": 2}}))
    shape = PoolShape(slots=2, capacity=96, chunk=96, tiles=32, smallest=96)
    return of(vlm, shape._replace(features=40)), of(vlm, shape)


@pytest.fixture(scope="module")
def prompts(engines):
    """Images and videos whose pixels are those of the seed; the second shows what the first does, and another one."""
    vlm = engines[0].vlm
    first, other = sample(vlm, [A, C], 5, seed=1), sample(vlm, [B], 6, seed=2)
    return [first, joined(vlm, first, other, [A, C, B]), other]


def joined(vlm, first, other, grids):
    """A prompt that shows the tiles of both."""
    whole = sample(vlm, grids, 7, seed=3)
    return dataclasses.replace(whole, pixels_ISSc=np.concatenate([first.pixels_ISSc, other.pixels_ISSc]))


def test_answers_and_scores_are_those_of_a_model_that_sees_anew(engines, prompts):
    keeping, seeing = engines
    for prompt in (*prompts, prompts[0]):
        mine, other = (engine.submit(Request(prompt, GREEDY)) for engine in engines)
        assert mine.result() == other.result()
        np.testing.assert_allclose(mine.logp, other.logp, atol=1e-5)
    scores = [engine.score(prompts, LABELS) for engine in engines]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_each_frame_is_seen_once(engines, prompts):
    features = engines[0].features
    engines[0].score(prompts, LABELS)
    tiles = [len(prompt.pixels_ISSc) for prompt in prompts]
    before = features.seen, features.found
    engines[0].score(prompts, LABELS)
    engines[0].submit(Request(prompts[1], GREEDY)).result()
    assert (features.seen, features.found) == (before[0], before[1] + sum(tiles) + tiles[1])
    assert before[0] == tiles[1], "the second prompt shows all there is"


def test_what_could_not_be_seen_is_not_taken_for_seen(engines, monkeypatch):
    features, fresh = engines[0].features, sample(engines[0].vlm, [A], 4, seed=50)

    def fails(*_):
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no memory left"):
        patched.setattr(features, "_see", fails)
        engines[0].score([fresh], LABELS)
    scores = [engine.score([fresh], LABELS) for engine in engines]
    np.testing.assert_allclose(*scores, atol=1e-5)


def test_what_was_shown_last_stays(engines, prompts):
    engine, (first, _, other) = engines[0], prompts
    features, vlm = engine.features, engine.vlm
    engine.score([first], LABELS)
    while len(features._free) >= len(other.pixels_ISSc):  # others fill the slots
        engine.score([first, sample(vlm, [A], 4, seed=100 + features.seen)], LABELS)
    seen = features.seen
    engine.score([first], LABELS)
    assert features.seen == seen
    engine.score([sample(vlm, [A, A], 4, seed=99)], LABELS)
    assert features.seen == seen + 2 * A.tokens and len(features._free) < A.tokens
    np.testing.assert_allclose(
        engine.score([first, other], LABELS), engines[1].score([first, other], LABELS), atol=1e-5
    )


def test_nothing_compiles_once_it_is_warm(engines, prompts):
    engine = engines[0]
    engine.warm_up()
    assert {"keep", "show 32"} <= set(engine.programs())
    with compilations() as compiled:
        engine.score(prompts, LABELS)
        engine.submit(Request(sample(engine.vlm, [B, C], 9, seed=5), GREEDY)).result()
    assert compiled == []


def test_tiles_of_images_are_found_by_themselves(vlm, params, make_prompt):
    """And a memory that reads visual tokens reads them all."""
    shape = PoolShape(slots=2, capacity=64, chunk=64, tiles=3, smallest=64)
    keeping, seeing = (Engine(Generator(vlm, params, stop_ids=[]), shape._replace(features=n)) for n in (4, 0))
    prompt = make_prompt(9, 3, seed=1)
    again = dataclasses.replace(make_prompt(12, 2, seed=2), pixels_ISSc=prompt.pixels_ISSc[[2, 0]])
    for one in (prompt, again):
        mine, other = (engine.submit(Request(one, GREEDY)) for engine in (keeping, seeing))
        assert mine.result() == other.result()
        np.testing.assert_allclose(mine.logp, other.logp, atol=1e-5)
    assert (keeping.features.seen, keeping.features.found) == (3, 2)


def test_models_that_features_would_not_do_for_are_refused(vlm, params):
    shape = PoolShape(slots=2, capacity=64, chunk=64, tiles=3, features=2)
    with pytest.raises(ValueError, match="must hold the 3 tiles"):
        Engine(Generator(vlm, params, stop_ids=[]), shape)
    video = VLM(resolve({"preset": "tiny_llava_video", "memory": "vlm2"}))
    with pytest.raises(ValueError, match="reads the vision tower itself; set features=0"):
        of(video, shape._replace(features=8))
    split = make_mesh(MeshConfig(data=2, fsdp=1), jax.devices()[:2])
    with pytest.raises(ValueError, match="where rows are not split"):
        Engine(Generator(vlm, params, stop_ids=[], mesh=split), shape._replace(features=8))
