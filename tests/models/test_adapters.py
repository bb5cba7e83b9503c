"""Adapters of whole models: off, they are not there; each row goes through its own; merged, they are weights."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from vlmem_jax.config import ConfigError
from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.models.adapters import merged
from vlmem_jax.trees import flatten, unflatten
from vlmem_jax.types import Batch, Text

ALL = ("q", "k", "v", "o", "gate", "up", "down")
TOWERS = {
    "tiny": ("q", "k", "v", "proj", "fc1", "fc2"),
    "tiny_qwen2_5_vl": ("q", "k", "v", "proj", "gate", "up", "down"),
    "tiny_qwen3_vl": ("q", "k", "v", "proj", "fc1", "fc2"),
}
T, TILES = 24, 4


@pytest.fixture(scope="module", params=TOWERS)
def world(request):
    """A model with an adapter on every map and a narrower one on two, its plain self, and three rows to read."""
    adapters = [
        {"name": "wide", "rank": 4, "targets": ALL, "vision": TOWERS[request.param]},
        {"name": "few", "rank": 2, "alpha": 6.0, "targets": ("v", "down")},
    ]
    layers = {"decoder": {"layers": 2}, "vision": {"layers": 3 if request.param == "tiny_qwen3_vl" else 2}}
    config = resolve({"preset": request.param, "memory": None, **layers, "adapters": adapters})
    vlm, plain = VLM(config), VLM(dataclasses.replace(config, adapters=()))
    params = drawn.random_params(vlm)
    rng, tile, M = np.random.default_rng(3), vlm.tile, TILES * vlm.tokens_per_tile
    text, views = (
        part for part in (Batch.empty((3,), T + M, TILES, tile).text, Batch.empty((3,), T, TILES, tile).views)
    )
    text.tokens_BT[:] = rng.integers(3, 100, text.tokens_BT.shape)
    text.segments_BT[:], views.segments_BM[:] = 1, 1
    text.visual_index_BT[:, :M] = np.arange(M)
    text.positions_BT[:] = np.arange(T + M).reshape(-1, *(1,) * (text.positions_BT.ndim - 2))
    views.pixels_BISSc[:] = rng.integers(0, 256, views.pixels_BISSc.shape)
    if views.layout_BI4 is not None:
        views.layout_BI4[..., :2] = 1
    read = jax.jit(
        lambda vlm, params, batch, adapter_B=None: vlm.score(params, vlm.hidden(params, batch, adapter_B=adapter_B)),
        static_argnums=0,
    )
    bare = {name: part for name, part in params.items() if name != "adapters"}
    return SimpleNamespace(
        vlm=vlm, plain=plain, params=params, bare=bare, batch=jax.tree.map(jnp.asarray, Batch(text, views)), read=read
    )


@pytest.fixture(scope="module")
def scores(world):
    """Scores through each of the adapters, and those of the plain model."""
    through = [world.read(VLM(world.vlm.config, n), world.params, world.batch) for n in (0, 1)]
    return [*through, world.read(world.plain, world.bare, world.batch)]


def test_off_is_the_program_and_the_numbers_of_the_model_without(world, scores):
    off = world.read(VLM(world.vlm.config, -1), world.params, world.batch)
    programs = [
        world.read.lower(vlm, params, world.batch).as_text()
        for vlm, params in ((VLM(world.vlm.config, -1), world.params), (world.plain, world.bare))
    ]
    assert programs[0] == programs[1]
    np.testing.assert_array_equal(off, scores[-1])
    for through in scores[:-1]:
        assert np.abs(through - scores[-1]).max() > 0.1


def test_each_row_goes_through_its_own(world, scores):
    found = world.read(world.vlm, world.params, world.batch, jnp.array([1, -1, 0]))
    for row, n in enumerate((1, -1, 0)):
        np.testing.assert_allclose(found[row], scores[n][row], atol=1e-5 * np.abs(scores[n][row]).max())
    np.testing.assert_array_equal(found[1], scores[-1][1])


@pytest.mark.parametrize("n", [0, 1])
def test_merged_weights_give_the_scores_of_the_adapter(world, scores, n):
    config, adapter = world.vlm.config, world.vlm.config.adapters[n]
    flat, start = flatten(jax.device_get(world.params)), f"adapters/{adapter.name}/"
    leaves = {path.removeprefix(start): leaf for path, leaf in flat.items() if path.startswith(start)}
    bare = {path: leaf for path, leaf in flat.items() if not path.startswith("adapters/")}
    weights = unflatten({path: merged(config, adapter, leaves, path, leaf) for path, leaf in bare.items()})
    found = world.read(world.plain, weights, world.batch)
    np.testing.assert_allclose(found, scores[n], atol=1e-5 * np.abs(scores[n]).max())


def test_token_by_token_as_read_at_once(world):
    """Each row through its own, prompt and answer."""
    adapter_B, steps = jnp.array([0, 1, -1]), 3
    text, views = world.batch.text, world.batch.views
    whole = world.read(world.vlm, world.params, world.batch, adapter_B)
    first = jax.tree.map(lambda x: x[:, :-steps], text)

    @jax.jit
    def prompt(params):
        visual = world.vlm.see(params, views, adapter_B=adapter_B)
        state = world.vlm.begin((first.segments_BT > 0).sum(-1), text.tokens_BT.shape[1])
        hidden, state = world.vlm.extend(params, state, first, visual, adapter_B=adapter_B)
        return world.vlm.score(params, hidden), state

    @jax.jit
    def step(params, state, tokens_B):
        text = Text.first(tokens_B[:, None], jnp.ones(3, jnp.int32))
        hidden, state = world.vlm.extend(params, state, text, adapter_B=adapter_B)
        return world.vlm.score(params, hidden), state

    found, state = prompt(world.params)
    for n in range(steps, -1, -1):
        np.testing.assert_allclose(found, whole[:, -n - 1], atol=2e-5 * np.abs(whole).max())
        if n:
            found, state = step(world.params, state, text.tokens_BT[:, -n])


@pytest.mark.parametrize(
    "adapters, message",
    [
        ([{"name": "a", "targets": ["fc1"]}], "adapters.a.targets must be among q, k, v, o, gate, up, down; got fc1"),
        ([{"name": "a", "vision": ["gate"]}], "adapters.a.vision must be among .*fc1, fc2; got gate"),
        ([{"name": "a", "targets": []}], "targets or vision must name a linear map"),
        ([{"name": "a", "rank": 0}], "rank must be at least 1"),
        ([{"name": "none"}], "name must be of letters"),
        ([{"name": "a"}, {"name": "a"}], "adapters must have names of their own, got a, a"),
    ],
)
def test_bad_settings_are_named(adapters, message):
    with pytest.raises(ConfigError, match=message):
        resolve({"preset": "tiny", "adapters": adapters})


def test_rows_that_choose_among_adapters_have_one_dropout():
    adapters = [{"name": "a", "dropout": 0.1}, {"name": "b"}]
    vlm = VLM(resolve({"preset": "tiny", "memory": None, "decoder": {"layers": 2}, "adapters": adapters}))
    batch = jax.tree.map(jnp.asarray, Batch.empty((2,), 8, 0, vlm.tile))
    with pytest.raises(ValueError, match="must have one dropout"):
        jax.eval_shape(lambda p: vlm.hidden(p, batch, jax.random.key(0), jnp.array([0, 1])), vlm.abstract())
