"""VLM^2's modules against an independent program: representation, banks, gradients through a whole stream."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import llava_golden
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.geometry.coordinates import coordinates, in_first_camera
from vlmem_jax.memory import Frame
from vlmem_jax.memory.vlm2 import VLM2Config
from vlmem_jax.memory.vlm2.banks import DualMemory
from vlmem_jax.memory.vlm2.represent import Representation
from vlmem_jax.models import VLM
from vlmem_jax.models.looking import in_turn
from vlmem_jax.trees import flatten, unflatten
from vlmem_jax.types import Geometry, VisualTokens

CLOSE = dict(atol=2e-5, rtol=1e-5)
REPRESENTATION = ("phi", "gate", "psi_v", "psi_g", "va", "fusion")
TRACES = {
    "residual_pooled": {},
    "literal_pooled": {"residual": False},
    "residual_flat": {"similarity": "flat"},
}


def loaded(module, weights):
    """The module with weights by their name there; heads are axes of their own here."""
    leaves = flatten(nnx.to_pure_dict(nnx.state(module)))
    assert leaves.keys() <= weights.keys()
    nnx.update(
        module, unflatten({path: jnp.asarray(weights[path].reshape(x.shape), x.dtype) for path, x in leaves.items()})
    )
    return module


def config_of(about):
    """Ours, of what a README of the fixtures says."""
    return VLM2Config(
        working=about["Lw"], episodic=about["Le"], heads=about["heads"], geometry_width=about["cg"],
        view_width=about["cv"], norm_eps=about["ln_eps"], place_width=about["hid_phi"],
        gate_width=about["hid_gate"], align_width=about["hid_va"], gamma_width=about["hid_gamma"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "vlm2"


@pytest.fixture(scope="module")
def world(folder):
    about, *_ = (
        json.loads(text) for text in re.findall(r"```json\n(.*?)```", (folder / "README.md").read_text(), re.S)
    )
    weights = dict(np.load(folder / "weights.npz"))
    return SimpleNamespace(about=about, config=config_of(about), width=about["c"], weights=weights)


def dual_memory(world, **changes):
    return loaded(
        DualMemory(dataclasses.replace(world.config, **changes), world.width, rngs=nnx.Rngs(0)), world.weights
    )


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_points_of_patches_in_the_first_camera(folder, world):
    inputs, wanted = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "represent"))
    points, poses, grid = inputs["local_points"], inputs["camera_poses"], world.about["h"]
    close = dict(rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(in_first_camera(points, poses), wanted["global_points"], **close)
    for scale, key in (("none", "coords_pooled"), ("clip", "coords"), ("first", "coords_stream")):
        np.testing.assert_allclose(coordinates(points, poses, grid, scale), wanted[key], **close)
    with pytest.raises(ValueError, match="multiples of 5 patches"):
        coordinates(points, poses, 5)


# --- representation ---------------------------------------------------------------------------------------------------


def test_frames_with_their_place_stage_by_stage(folder, world):
    module = loaded(Representation(world.config, world.width, rngs=nnx.Rngs(0)), world.weights)
    inputs, wanted = (dict(np.load(folder / f"{name}.npz")) for name in ("inputs", "represent"))
    x, tokens, views = (jnp.asarray(inputs[name], jnp.float32) for name in "FGZ")
    coords = jnp.asarray(wanted["coords"], jnp.float32)
    place = module.phi(coords)
    np.testing.assert_allclose(place, wanted["phi"], **CLOSE)
    np.testing.assert_allclose(module.alpha(x, place), wanted["alpha"], **CLOSE)
    placed = module.inject(x, coords)
    np.testing.assert_allclose(placed, wanted["F_pa"], **CLOSE)
    np.testing.assert_allclose(module.psi_v(views), wanted["Z_hat"], **CLOSE)
    aligned = module.align(tokens, views)
    np.testing.assert_allclose(aligned[:, :-1], wanted["G_va"], **CLOSE)
    np.testing.assert_allclose(aligned[:, -1], wanted["Z_g"], **CLOSE)
    np.testing.assert_allclose(aligned, wanted["G_vc"], **CLOSE)
    np.testing.assert_allclose(module(x, Geometry(tokens, views, coords)), wanted["H"], **CLOSE)


def test_it_starts_as_the_frames_that_come_in(world):
    module = Representation(world.config, world.width, rngs=nnx.Rngs(3))
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(2, 5, world.width)), jnp.float32)
    widths = world.config.geometry_width, world.config.view_width, 3
    geometry = Geometry(*(jnp.asarray(draw(size=(2, 5, width)), jnp.float32) for width in widths))
    np.testing.assert_array_equal(module(x, geometry), x)


# --- banks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", TRACES)
def test_a_stream_frame_by_frame(folder, world, trace):
    wanted, module = dict(np.load(folder / f"stream_{trace}.npz")), dual_memory(world, **TRACES[trace])
    frames = jnp.asarray(np.load(folder / "represent.npz")["H"], jnp.float32)
    banks, yes = module.begin(1, frames.shape[1], jnp.float32), jnp.ones(1, bool)
    take = jax.jit(lambda banks, x: module.take(banks, x, yes, ~yes))
    for t, x in enumerate(frames[:, None]):
        now = banks.count_B
        read_w, read_e = module.mem_w(x, banks.working, now), module.mem_e(x, banks.episodes, now)
        np.testing.assert_allclose(read_w[0], wanted["Mw"][t], **CLOSE)
        np.testing.assert_allclose(read_e[0], wanted["Me"][t], **CLOSE)
        np.testing.assert_allclose(module.gate(read_w, read_e)[0], wanted["gamma"][t], **CLOSE)
        before = banks
        made, banks = take(banks, x)
        np.testing.assert_allclose(made[0], wanted["M"][t], **CLOSE)
        filled = np.asarray(before.episodes.filled_BL[0])
        alike = np.asarray(module.alike(before, made, made.mean(1)))[0]
        key = "sim_flat" if module.config.similarity == "flat" else "sim"
        np.testing.assert_allclose(alike[filled], wanted[key][t][filled], **CLOSE)
        assert np.isnan(wanted[key][t]).tolist() == (~filled).tolist()
        assert int(module.slot(before, made, made.mean(1))[0]) == wanted["slot"][t]
        assert bool(wanted["appended"][t]) == (not filled.all())
        np.testing.assert_array_equal(banks.episodes.time_BL[0], wanted["bank_e_t"][t])
        assert sorted(banks.working.time_BL[0].tolist()) == sorted(wanted["bank_w_t"][t].tolist())
        assert [int(bank.filled_BL.sum()) for bank in (banks.working, banks.episodes)] == [
            wanted["n_w"][t], wanted["n_e"][t],
        ]  # fmt: skip
    np.testing.assert_allclose(banks.frames_BLND[0], wanted["final_bank_e"], **CLOSE)
    read, times = module.readout(banks)
    np.testing.assert_allclose(read[0], wanted["final_bank_e"][wanted["llm_order"]], **CLOSE)
    np.testing.assert_array_equal(times[0], wanted["bank_e_t"][-1][wanted["llm_order"]])


def test_gradients_through_a_whole_stream(folder, world):
    wanted, module = dict(np.load(folder / "gradcheck.npz")), dual_memory(world)
    frames = jnp.asarray(np.load(folder / "represent.npz")["H"], jnp.float32)[:, None]
    graph, state = nnx.split(module)
    yes, weights = jnp.ones(1, bool), jnp.asarray(wanted["R"], jnp.float32)[:, None]

    def loss(params, frames):
        module = nnx.merge(graph, params)

        def step(banks, x):
            made, banks = module.take(banks, x, yes, ~yes)
            return banks, made

        _, made = jax.lax.scan(step, module.begin(1, frames.shape[2], jnp.float32), frames)
        return (weights * made).sum()

    value, (of_params, of_frames) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, frames)
    of_params = flatten(nnx.to_pure_dict(of_params))
    assert float(value) == pytest.approx(float(wanted["loss"]), rel=1e-4)
    for gradient, direction, along in (
        (of_frames[:, 0], "dH", "dL_dH"),
        (of_params["mem_w/k/kernel"], "dWk_work", "dL_dWk_work"),
        (of_params["mem_e/v/kernel"], "dWv_epi", "dL_dWv_epi"),
    ):
        found = float((np.asarray(gradient, np.float64).reshape(wanted[direction].shape) * wanted[direction]).sum())
        assert found == pytest.approx(float(wanted[along]), rel=2e-4, abs=1e-4), along


# --- to the answer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(golden, folder):
    """The base of golden/llava_video with a memory of the e2e weights, and what was recorded of it."""
    texts = re.findall(r"```json\n(.*?)```", (folder / "README.md").read_text(), re.S)
    base, own = llava_golden.load(golden / "llava_video"), config_of(json.loads(texts[1]))
    weights, io = (dict(np.load(folder / f"e2e_{name}.npz")) for name in ("weights", "io"))
    made = VLM(dataclasses.replace(base.vlm.config, memory=own))
    places = {
        path: path.removeprefix("represent/").removeprefix("banks/") for path in flatten(made.abstract()["memory"])
    }
    shapes = flatten(made.abstract()["memory"])
    memory = {
        path: jnp.asarray(weights[name].reshape(shapes[path].shape), jnp.float32) for path, name in places.items()
    }
    return SimpleNamespace(vlm=made, params=base.params | {"memory": unflatten(memory)}, io=io, base=base)


@pytest.mark.parametrize("mode", ["offline", "stream"])
def test_from_features_to_answers(whole, mode):
    made, io = whole.vlm, whole.io
    modules, grid = made._merge(whole.params), made.config.vision.grid
    coords = coordinates(io["local_points"], io["camera_poses"], grid)
    geometry = Geometry(*(jnp.asarray(x, jnp.float32)[None] for x in (io["G"], io["Z"], coords)))
    frames = jnp.asarray(io["F"])[None]
    made_of = in_turn(modules.memory, frames, jnp.ones(frames.shape[:2], jnp.int32), geometry)
    np.testing.assert_allclose(made_of[0], io["M"], **CLOSE)
    if mode == "stream":
        state, yes = modules.memory.begin(1, jnp.float32), jnp.ones(1, bool)
        for n in range(frames.shape[1]):
            one = Frame(frames[:, n], jax.tree.map(lambda x, n=n: x[:, n], geometry))
            _, state = modules.memory.take(state, one, yes, ~yes)
        made_of, times = modules.memory.readout(state)
        assert times[0].tolist() == io["stream_frames"].tolist()
    else:
        np.testing.assert_allclose(modules.projector.mlp(made_of[0]), io["projected"], **CLOSE)
    visual = modules.projector(made_of[0]).reshape(1, -1, made.config.decoder.width)

    def logits(ids):
        batch = llava_golden.spliced(whole.base, ids, visual.shape[1])
        seen = VisualTokens(visual, batch.views.positions_BM, batch.views.segments_BM)
        return made.score(whole.params, made.read(whole.params, batch.text, seen))[0]

    ids = io["prompt_ids"]
    np.testing.assert_allclose(logits(ids), io[f"{mode}_logits"], atol=2e-4, rtol=1e-4)
    for wanted in io[f"{mode}_greedy"]:
        assert int(logits(ids)[-1].argmax()) == wanted
        ids = np.append(ids, wanted)
