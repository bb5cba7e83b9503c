"""Qwen2.5-VL against numbers of the published implementation."""

import dataclasses
import functools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen_golden
from flax import nnx
from PIL import Image
from qwen_golden import PROMPTS

from tests.verbs import embeddings, extended
from vlmem_jax.families import qwen2_5_vl
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.models import VLM
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.processing import PatchConfig
from vlmem_jax.processing.patches import image_grid, smart_resize, write_blocks
from vlmem_jax.trees import flatten
from vlmem_jax.vision import normalise
from vlmem_jax.vision.qwen_vit import Segments

LOGITS = dict(atol=2e-4, rtol=1e-4)
FILES = (*PROMPTS, "batch_leftpad")
SEEN = ("image", "two_images", "video")
"""Prompts whose files say what the tower does."""
TOWER = dict(atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "qwen2_5_vl"


@pytest.fixture(scope="module")
def model(folder):
    return qwen_golden.load(folder)


@pytest.fixture(scope="module")
def prompt(model):
    """The arrays of a prompt file, and its rows."""

    def load(name):
        arrays = dict(np.load(model.folder / f"{name}.npz"))
        return arrays, qwen_golden.rows(arrays, model.content, model.vlm.config.vision.geometry)

    return load


# --- images -----------------------------------------------------------------------------------------------------------


def test_smart_resize(folder):
    data = json.loads((folder / "smart_resize.json").read_text())
    names = ("height", "width", "factor", "min_pixels", "max_pixels")
    for case in data["cases"]:
        found = smart_resize(*(case[name] for name in names))
        assert found == (case["resized_height"], case["resized_width"]), case
    for case in data["must_raise"]:
        with pytest.raises(ValueError, match="times as long as wide"):
            smart_resize(case["height"], case["width"], *(data["cases"][0][name] for name in names[2:]))


def test_pixels_and_patches(folder, model):
    data, vision = np.load(folder / "image_processor.npz"), model.vlm.config.vision
    for n in range(sum(name.startswith("pixel_values") for name in data.files)):
        image, wanted = Image.fromarray(data[f"image_{n}"]), data[f"pixel_values_{n}"]
        patch = math.isqrt(wanted.shape[1] // (3 * vision.patch_frames))  # of the file: it need not be the model's
        c = dataclasses.replace(vision, patch_size=patch, window=patch * vision.merge)
        grid = image_grid(*image.size, PatchConfig(), c.geometry)
        assert [1, grid.rows * c.merge, grid.cols * c.merge] == data[f"image_grid_thw_{n}"].ravel().tolist()
        tiles = np.empty((grid.tokens, c.tile.side, c.tile.side, c.tile.channels), np.uint8)
        write_blocks([image], grid, np.arange(grid.tokens), c.geometry, tiles)
        found = normalise(jnp.asarray(tiles), c.channels(c.pixel_mean), c.channels(c.pixel_std), jnp.float32)
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-6)


# --- positions and windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_positions(prompt, name):
    arrays, rows = prompt(name)
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row.placed.positions_T, arrays["position_ids"][:, n, row.mask].T)
        assert row.placed.positions_T.max() + 1 == arrays["next_position"][n]
        assert arrays["rope_deltas"][n, 0] == arrays["next_position"][n] - len(row.tokens_T)
        np.testing.assert_array_equal(row.placed.visual_positions_M, row.placed.positions_T[row.is_visual][order(row)])


def test_positions_are_not_those_of_newer_libraries(prompt):
    """Which for some videos give others, and so other scores; the files of those hold them."""
    others = [name for name in PROMPTS if "logits_hf5_positions" in prompt(name)[0]]
    assert "video" in others
    for name in others:
        arrays, [row] = prompt(name)
        assert not np.array_equal(row.placed.positions_T, arrays["position_ids_hf5"][:, 0].T), name


def order(row):
    """The index of the visual token at each place of the window order."""
    return np.argsort(row.placed.slot_C)


@pytest.mark.parametrize("name", SEEN)
def test_windows(prompt, model, name):
    arrays, [row] = prompt(name)
    vision, layout = model.vlm.config.vision, row.placed.layout_I4
    np.testing.assert_array_equal(order(row), arrays["vision_window_index"])
    for column, bounds in ((0, "vision_cu_window_seqlens"), (1, "vision_cu_seqlens")):
        starts = (np.unique(layout[:, column]) - 1) * vision.merge**2
        np.testing.assert_array_equal([*starts, len(layout) * vision.merge**2], arrays[bounds])
    within = np.indices((vision.merge,) * 2).reshape(2, -1).T
    places = layout[row.placed.slot_C][:, None, 2:] * vision.merge + within
    np.testing.assert_array_equal(places.reshape(-1, 2), arrays["vision_pos_hw"])
    tower = model.vlm._merge(model.params).vision
    tables = tower.rotation(jnp.asarray(layout[None, row.placed.slot_C, 2:]))
    for table, wanted in zip(tables, ("vision_rope_cos", "vision_rope_sin"), strict=True):
        np.testing.assert_allclose(np.concatenate([table[0], table[0]], axis=-1), arrays[wanted], atol=1e-6)


# --- vision tower -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(prompt, model):
    """Those prompts as rows of one batch, padded."""
    rows = [row for name in SEEN for row in prompt(name)[1]]
    return qwen_golden.batch(model.vlm, rows)


@pytest.fixture(scope="module")
def layer_outputs(model, seen):
    """Outputs of the patch embedding and of each layer, one after the other."""
    vision = model.vlm._merge(model.params).vision
    c, (graph, layers) = vision.config, nnx.split(vision.layers)
    B, I, S = seen.views.pixels_BISSc.shape[:3]
    segments = Segments(*(jnp.repeat(seen.views.layout_BI4[..., n], S * S, axis=1) for n in range(2)))
    tables = vision.rotation(seen.views.layout_BI4[..., 2:])
    run = jax.jit(lambda state, x, full: nnx.merge(graph, state)(x, tables, segments, full))
    outputs = [vision.patch(seen.views.pixels_BISSc.reshape(B, I * S * S, *vision.patch.kernel.shape[:-1]))]
    for n in range(c.layers):
        state = jax.tree.map(lambda leaf, n=n: leaf[n], layers)
        outputs.append(run(state, outputs[-1], jnp.bool_(n in c.full_layers)))
    return outputs


@pytest.mark.parametrize("name", SEEN)
def test_each_layer_of_the_vision_tower(prompt, model, layer_outputs, name):
    arrays, [row] = prompt(name)
    n, count, merge = SEEN.index(name), len(arrays["vision_patch_embed"]), model.vlm.config.vision.merge
    blocks = layer_outputs[0][n, :count].reshape(count // merge**2, merge**2, -1)
    in_order = blocks[row.placed.slot_C].reshape(count, -1)
    np.testing.assert_allclose(in_order, arrays["vision_patch_embed"], **TOWER)
    for layer, found in enumerate(layer_outputs[1:]):
        np.testing.assert_allclose(found[n, :count], arrays[f"vision_block_{layer}"], **TOWER)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
def test_visual_tokens(prompt, model, seen, implementation):
    vlm = VLM(dataclasses.replace(model.vlm.config, attention=AttentionConfig(implementation)))
    merged = jax.jit(lambda *given: vlm.see(*given).tokens_BMD)(model.params, seen.views)
    for n, name in enumerate(SEEN):
        arrays, [row] = prompt(name)
        np.testing.assert_allclose(merged[n, row.placed.slot_C], arrays["vision_merged"], **TOWER)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(prompt, model):
    """All prompts as rows of one batch, padded on the right (in one file they were on the left)."""
    return qwen_golden.batch(model.vlm, [row for name in FILES for row in prompt(name)[1]])


@pytest.fixture(scope="module")
def of_file(prompt):
    """(row of `everything`, row of the file, golden arrays, what is known of it) of the prompts of a file."""

    def rows(name):
        first = sum(len(prompt(other)[1]) for other in FILES[: FILES.index(name)])
        arrays, found = prompt(name)
        return [(first + n, n, arrays, row) for n, row in enumerate(found)]

    return rows


@pytest.fixture(scope="module")
def outputs(model, everything):
    return jax.jit(lambda *x: (model.vlm.logits(*x), model.vlm.hidden(*x)))(model.params, everything)


@pytest.mark.parametrize("name", FILES)
def test_logits_and_hidden_states(of_file, model, outputs, name):
    logits, hidden = outputs
    last = f"hidden_{model.vlm.config.decoder.layers}"
    for b, n, arrays, row in of_file(name):
        t = len(row.tokens_T)
        np.testing.assert_allclose(logits[b, :t], arrays["logits"][n, row.mask], **LOGITS)
        if last in arrays:
            np.testing.assert_allclose(hidden[b, :t], arrays[last][n, row.mask], **LOGITS)


@pytest.mark.parametrize("backend", ["tpu_interpret", "gpu_interpret"])
def test_logits_through_the_kernel_for_packed_rows(of_file, model, everything, packed_kernel, backend):
    packed_kernel(backend)
    logits = jax.jit(lambda *given: model.vlm.logits(*given))(model.params, everything)
    for name in FILES:
        for b, n, arrays, row in of_file(name):
            np.testing.assert_allclose(logits[b, : len(row.tokens_T)], arrays["logits"][n, row.mask], **LOGITS)


def test_embeddings_and_each_layer(of_file, model, everything):
    vlm, c = model.vlm, model.vlm.config.decoder
    named = [row for name in PROMPTS for row in of_file(name)]

    found = jax.jit(functools.partial(embeddings, vlm))(model.params, everything)
    for b, n, arrays, row in named:
        np.testing.assert_allclose(found[b, : len(row.tokens_T)], arrays["inputs_embeds"][n], **LOGITS)
    for layer in range(1, c.layers):
        short = VLM(dataclasses.replace(vlm.config, decoder=dataclasses.replace(c, layers=layer)))
        decoder = dict(model.params["decoder"])
        decoder["layers"] = jax.tree.map(lambda leaf, n=layer: leaf[:n], decoder["layers"])
        decoder["norm"] = {"scale": jnp.ones_like(decoder["norm"]["scale"])}
        found = jax.jit(short.hidden)(dict(model.params, decoder=decoder), everything)
        for b, n, arrays, row in named:
            wanted = arrays[f"hidden_{layer}"][n]
            wanted = wanted / np.sqrt(
                (wanted**2).mean(-1, keepdims=True) + c.norm_eps
            )  # what our last norm makes of it
            np.testing.assert_allclose(found[b, : len(row.tokens_T)], wanted, **LOGITS)


def test_greedy_decoding_with_the_cache(of_file, model, everything):
    vlm = model.vlm
    known = [row for name in FILES for row in of_file(name) if "greedy_ids" in row[2]]
    steps = {row[2]["greedy_ids"].shape[1] for row in known}.pop()
    ids = np.zeros((len(everything.text.tokens_BT), steps), np.int32)
    for b, n, arrays, _ in known:
        ids[b] = arrays["greedy_ids"][n]
    capacity = everything.text.tokens_BT.shape[1] + steps
    logits, state = jax.jit(vlm.prefill, static_argnums=2)(model.params, everything, capacity)
    step = jax.jit(functools.partial(extended, vlm))
    for b, n, arrays, _ in known:
        assert state.position_B[b] == arrays["next_position"][n]
    for t in range(steps):
        for b, n, arrays, _ in known:
            np.testing.assert_allclose(logits[b], arrays["greedy_step_logits"][n, t], **LOGITS)
            assert logits[b].argmax() == ids[b, t]
        logits, state = step(model.params, state, jnp.asarray(ids[:, t : t + 1]), jnp.ones(len(ids), jnp.int32))


def test_greedy_decoding_without_the_cache(of_file, model, everything):
    """Every token's choice in one forward pass over prompt and answer."""
    vlm, [(_, n, arrays, row)] = model.vlm, of_file("mixed")
    ids = arrays["greedy_ids"][n]
    tokens_T = np.append(row.tokens_T, ids.astype(np.int32))
    longer = SimpleNamespace(**vars(row))
    longer.tokens_T, longer.is_visual = tokens_T, np.append(row.is_visual, np.zeros(len(ids), bool))
    after = arrays["next_position"][n] + np.arange(len(ids), dtype=np.int32)
    longer.placed = row.placed._replace(positions_T=np.append(row.placed.positions_T, after[:, None].repeat(3, 1), 0))
    logits = jax.jit(vlm.logits)(model.params, qwen_golden.batch(vlm, [longer]))
    np.testing.assert_array_equal(logits[0, len(row.tokens_T) - 1 : -1].argmax(-1), ids)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_both_layouts_of_a_checkpoint_are_the_same_parameters(model, folder, tmp_path):
    names = json.loads((folder / "weight_keys.json").read_text())
    table = qwen2_5_vl.name_table(model.vlm.config)
    hub = {name: list(rule.shape) for rule in table for name in rule.names}
    copies = {name for rule in table for name in rule.copies}  # a tied head may be listed
    assert hub == {name: shape for name, shape in names.values() if name not in copies}
    in_memory = {name for rule in qwen2_5_vl.name_table(model.vlm.config, nested=True) for name in rule.names}
    assert in_memory == set(names) - copies == set(model.weights) - copies
    (tmp_path / "model.safetensors").symlink_to(folder.resolve() / "checkpoint_hub_layout.safetensors")
    found = from_arrays(model.vlm.config, dict(Tensors(tmp_path)))
    for path, leaf in flatten(found).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[path], strict=True, err_msg=path)
