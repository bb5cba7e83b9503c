"""Qwen3-VL against numbers of the published implementation."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen3_golden
from flax import nnx
from qwen3_golden import PROMPTS

from tests.verbs import embeddings, extended
from vlmem_jax.decoder.frequencies import tables_of
from vlmem_jax.families import qwen3_vl
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import deep_tap
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.positions import PatchGrid
from vlmem_jax.trees import flatten
from vlmem_jax.vision.patch_tower import Segments

LOGITS = dict(atol=2e-4, rtol=1e-4)
FILES = (*PROMPTS, "batch_leftpad", "video_wrapped")
SEEN = ("image", "two_images", "video", "two_videos")
"""Prompts whose files say what the tower does."""
TOWER = dict(atol=1e-4, rtol=1e-5)
MERGED = dict(atol=5e-5, rtol=1e-5)
"""Tells the two kinds of GELU apart."""


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "qwen3_vl"


@pytest.fixture(scope="module")
def model(folder):
    return qwen3_golden.load(folder)


@pytest.fixture(scope="module")
def prompt(model):
    """The arrays of a prompt file, and its rows."""

    def load(name):
        arrays = dict(np.load(model.folder / f"{name}.npz"))
        if name == "video_wrapped":  # of the same video
            arrays["pixel_values_videos"] = np.load(model.folder / "video.npz")["pixel_values_videos"]
        return arrays, qwen3_golden.rows(arrays, model.content, model.vlm.config.vision.geometry)

    return load


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_positions(prompt, name):
    arrays, rows = prompt(name)
    for n, row in enumerate(rows):
        np.testing.assert_array_equal(row.placed.positions_T, arrays["position_ids"][:, n, row.mask].T)
        assert row.placed.positions_T.max() + 1 == arrays["next_position"][n]
        assert arrays["rope_deltas"][n, 0] == arrays["next_position"][n] - len(row.tokens_T)
        np.testing.assert_array_equal(row.placed.visual_positions_M, row.placed.positions_T[row.is_visual])
        np.testing.assert_array_equal(row.placed.slot_C, np.arange(row.is_visual.sum()), "the order of the input")


def test_axes_take_turns_over_the_pairs_of_a_head(prompt, model):
    known = [name for name in PROMPTS if "rope_cos" in prompt(name)[0]]
    assert known
    for name in known:
        arrays, [row] = prompt(name)
        positions_BTA = jnp.asarray(row.placed.positions_T[None])
        tables = tables_of(model.vlm.config.decoder, positions_BTA, jnp.ones(positions_BTA.shape[:2], jnp.int32))
        for table, wanted in zip(tables, ("rope_cos", "rope_sin"), strict=True):
            np.testing.assert_allclose(np.concatenate([table[0]] * 2, axis=-1), arrays[wanted][0], atol=1e-5)


@pytest.mark.parametrize("name", SEEN)
def test_patches_of_a_frame_see_each_other(prompt, model, name):
    arrays, [row] = prompt(name)
    vision, layout = model.vlm.config.vision, row.placed.layout_I4
    np.testing.assert_array_equal(layout[:, 0], layout[:, 1], "a frame is one window")
    starts = (np.unique(layout[:, 1]) - 1) * vision.merge**2
    np.testing.assert_array_equal([*starts, len(layout) * vision.merge**2], arrays["vision_cu_seqlens"])
    tower = model.vlm._merge(model.params).vision
    np.testing.assert_array_equal(tower.places(jnp.asarray(layout[None, :, 2:]))[0], arrays["vision_pos_hw"])
    for table, wanted in zip(tower.rotation(jnp.asarray(layout[None, :, 2:])), ("cos", "sin"), strict=True):
        both = np.concatenate([table[0], table[0]], axis=-1)
        np.testing.assert_allclose(both, arrays[f"vision_rope_{wanted}"], atol=1e-6)
    found = tower.positions(jnp.asarray(layout[None]))[0]
    np.testing.assert_allclose(found, arrays["vision_pos_embed"], atol=1e-5)


def test_the_table_of_positions_is_stretched_to_each_frame(folder, model):
    tower, merge = model.vlm._merge(model.params).vision, model.vlm.config.vision.merge
    data = np.load(folder / "pos_embed.npz")
    assert data.files
    for name in data.files:
        rows, cols = (int(side) // merge for side in name.removeprefix("pos_").split("x"))
        placed = qwen3_golden.place(
            np.zeros(rows * cols, int), [PatchGrid(1, rows, cols)], (0, 1), tower.config.geometry
        )
        np.testing.assert_allclose(tower.positions(jnp.asarray(placed.layout_I4[None]))[0], data[name], atol=1e-5)


def test_norms_of_small_numbers(folder, model):
    """Which a wrong epsilon changes by about 1."""
    modules, data = model.vlm._merge(model.params), np.load(folder / "norms.npz")

    def first(stacked, *names):
        graph, state = nnx.split(stacked)
        found = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[0], state))
        return functools.reduce(getattr, names, found)

    norms = {
        "vision_norm1": first(modules.vision.layers, "norm1"),
        "merger_norm": modules.projector.norm,
        "deepstack_norm": first(modules.projector.levels, "norm"),
        "q_norm": first(modules.decoder.layers, "attn", "q_norm"),
        "final_norm": modules.decoder.norm,
    }
    assert {f"{name}_{end}" for name in norms for end in ("in", "out")} == set(data.files)
    for name, norm in norms.items():
        np.testing.assert_allclose(norm(jnp.asarray(data[f"{name}_in"])), data[f"{name}_out"], atol=1e-5, rtol=1e-5)


# --- vision tower -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(prompt, model):
    """Those prompts as rows of one batch, padded."""
    rows = [row for name in SEEN for row in prompt(name)[1]]
    return qwen3_golden.batch(model.vlm, rows)


@pytest.fixture(scope="module")
def layer_outputs(model, seen):
    """What goes into the first layer, and outputs of each layer, one after the other."""
    vision = model.vlm._merge(model.params).vision
    c, (graph, layers) = vision.config, nnx.split(vision.layers)
    layout_BI4 = seen.views.layout_BI4
    segments = Segments(*(jnp.repeat(layout_BI4[..., n], c.merge**2, axis=1) for n in range(2)))
    tables = vision.rotation(layout_BI4[..., 2:])
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, tables, segments, None))
    outputs = [vision.enter(seen.views.pixels_BISSc, layout_BI4)]
    for n in range(c.layers):
        outputs.append(run(jax.tree.map(lambda leaf, n=n: leaf[n], layers), outputs[-1]))
    return outputs


@pytest.mark.parametrize("name", SEEN)
def test_each_layer_of_the_vision_tower(prompt, layer_outputs, name):
    arrays, [row] = prompt(name)
    n, count = SEEN.index(name), len(arrays["vision_patch_embed"])
    np.testing.assert_allclose(layer_outputs[0][n, :count], arrays["vision_block_input"], **TOWER)
    for layer, found in enumerate(layer_outputs[1:]):
        np.testing.assert_allclose(found[n, :count], arrays[f"vision_block_{layer}"], **TOWER)


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "gpu_interpret"])
def test_visual_tokens_and_what_deeper_layers_add_to_them(prompt, model, seen, implementation):
    vlm = VLM(dataclasses.replace(model.vlm.config, attention=AttentionConfig(implementation)))
    visual = jax.jit(vlm.see)(model.params, seen.views)
    assert len(visual.deep_NBMD) == len(vlm.config.vision.deep_layers)
    for n, name in enumerate(SEEN):
        arrays, [row] = prompt(name)
        count = int(row.is_visual.sum())
        np.testing.assert_allclose(visual.tokens_BMD[n, :count], arrays["vision_merged"], **MERGED)
        for level, deep_BMD in enumerate(visual.deep_NBMD):
            np.testing.assert_allclose(deep_BMD[n, :count], arrays[f"vision_deepstack_{level}"], **MERGED)


# --- the whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(prompt, model):
    """All prompts as rows of one batch, padded on the right (in one file they were on the left)."""
    return qwen3_golden.batch(model.vlm, [row for name in FILES for row in prompt(name)[1]])


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


def test_loss_of_the_next_token(of_file, outputs):
    """In fp32 it is that of the published logits, at every token of every prompt."""
    for name in FILES:
        for b, n, arrays, row in of_file(name):
            wanted = arrays["logits"][n, row.mask].astype(np.float64)
            found, next_T = np.asarray(outputs[0][b, : len(row.tokens_T)], np.float64), row.tokens_T[1:, None]
            losses = [
                -np.take_along_axis(x[:-1] - np.log(np.exp(x[:-1]).sum(-1, keepdims=True)), next_T, -1).mean()
                for x in (found, wanted)
            ]
            np.testing.assert_allclose(*losses, rtol=1e-5)


def test_embeddings_and_each_layer(of_file, model, everything):
    """Before and after what is added to visual tokens there."""
    vlm, c = model.vlm, model.vlm.config.decoder
    named, levels = [row for name in PROMPTS for row in of_file(name)], len(vlm.config.vision.deep_layers)
    found = jax.jit(functools.partial(embeddings, vlm))(model.params, everything)
    for b, n, arrays, row in named:
        np.testing.assert_allclose(found[b, : len(row.tokens_T)], arrays["inputs_embeds"][n], **LOGITS)
    visual = jax.jit(vlm.see)(model.params, everything.views)
    for layers in range(1, c.layers):
        short = VLM(dataclasses.replace(vlm.config, decoder=dataclasses.replace(c, layers=layers)))
        decoder = dict(model.params["decoder"])
        decoder["layers"] = jax.tree.map(lambda leaf, n=layers: leaf[:n], decoder["layers"])
        decoder["norm"] = {"scale": jnp.ones_like(decoder["norm"]["scale"])}
        compared = {f"hidden_{layers}": layers, f"layer_{layers - 1}_before_deepstack": layers - 1}
        for key, added in list(compared.items())[: 1 + (layers <= levels)]:
            deep = None if not added else visual.deep_NBMD[:added]
            part = dataclasses.replace(visual, deep_NBMD=deep)
            found = jax.jit(short.read)(dict(model.params, decoder=decoder), everything.text, part)
            for b, n, arrays, row in named:
                wanted = arrays[key][n]
                # what our last norm makes of it
                wanted = wanted / np.sqrt((wanted**2).mean(-1, keepdims=True) + c.norm_eps)
                np.testing.assert_allclose(found[b, : len(row.tokens_T)], wanted, **LOGITS)


def decode(model, known, logits, state, steps):
    """Follows the published choices from a state, and compares the scores before each."""
    step, ids = jax.jit(functools.partial(extended, model.vlm)), np.zeros((len(logits), steps), np.int32)
    for b, n, arrays, _ in known:
        ids[b] = arrays["greedy_ids"][n]
        assert state.position_B[b] == arrays["next_position"][n]
    for t in range(steps):
        for b, n, arrays, _ in known:
            np.testing.assert_allclose(logits[b], arrays["greedy_step_logits"][n, t], **LOGITS)
            assert logits[b].argmax() == ids[b, t]
        logits, state = step(model.params, state, jnp.asarray(ids[:, t : t + 1]), jnp.ones(len(ids), jnp.int32))


def test_greedy_decoding_with_the_cache(of_file, model, everything):
    known = [row for name in FILES for row in of_file(name)]
    steps = {row[2]["greedy_ids"].shape[1] for row in known}.pop()
    capacity = everything.text.tokens_BT.shape[1] + steps
    decode(model, known, *jax.jit(model.vlm.prefill, static_argnums=2)(model.params, everything, capacity), steps)


def test_greedy_decoding_after_a_prompt_in_chunks(of_file, model, everything):
    """That cut images, and steps of videos, in two: what deeper layers add follows the tokens."""
    vlm, chunk = model.vlm, 11
    known = [row for name in FILES for row in of_file(name)]
    steps, T = known[0][2]["greedy_ids"].shape[1], everything.text.tokens_BT.shape[1]
    cuts = [row.is_visual[at - 1 : at + 1].all() for *_, row in known for at in range(chunk, len(row.tokens_T), chunk)]
    assert any(cuts)
    text = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2)), everything.text)
    visual = jax.jit(vlm.see)(model.params, everything.views)
    state = vlm.begin((text.segments_BT > 0).sum(-1, dtype=jnp.int32), text.tokens_BT.shape[1] + steps)
    logits, first, later = jnp.zeros((len(text.tokens_BT), vlm.config.decoder.vocab)), *(jax.jit(vlm.extend),) * 2
    for at in range(0, T, chunk):
        part = jax.tree.map(lambda x, at=at: x[:, at : at + chunk], text)
        hidden_BD, state = (later if at else first)(model.params, state, part, visual)
        here_B = (part.segments_BT > 0).any(-1)
        logits = jnp.where(here_B[:, None], vlm.score(model.params, hidden_BD), logits)
    decode(model, known, logits, state, steps)


def test_greedy_decoding_without_the_cache(of_file, model, everything):
    """Every token's choice in one forward pass over prompt and answer."""
    vlm, [(_, n, arrays, row)] = model.vlm, of_file("mixed")
    ids = arrays["greedy_ids"][n]
    longer = SimpleNamespace(**vars(row))
    longer.tokens_T = np.append(row.tokens_T, ids.astype(np.int32))
    longer.is_visual = np.append(row.is_visual, np.zeros(len(ids), bool))
    after = arrays["next_position"][n] + np.arange(len(ids), dtype=np.int32)
    longer.placed = row.placed._replace(positions_T=np.append(row.placed.positions_T, after[:, None].repeat(3, 1), 0))
    logits = jax.jit(vlm.logits)(model.params, qwen3_golden.batch(vlm, [longer]))
    np.testing.assert_array_equal(logits[0, len(row.tokens_T) - 1 : -1].argmax(-1), ids)


def test_a_tap_needs_its_layer(model, everything):
    visual = jax.eval_shape(model.vlm.see, model.params, everything.views)
    few = dataclasses.replace(model.vlm.config.decoder, layers=len(visual.deep_NBMD) - 1)
    short = VLM(dataclasses.replace(model.vlm.config, decoder=few))
    with pytest.raises(
        ValueError, match=f"a tap stands at layer {few.layers}, .* model.decoder.layers is {few.layers}"
    ):
        jax.eval_shape(short.read, short.abstract(), everything.text, visual)
    assert deep_tap(visual, everything.text.visual_index_BT).layers == tuple(range(len(visual.deep_NBMD)))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", qwen3_vl.LAYOUTS)
def test_each_layout_of_a_checkpoint_is_the_same_parameters(model, folder, tmp_path, prefixes):
    names = json.loads((folder / "weight_keys.json").read_text())
    table = qwen3_vl.name_table(model.vlm.config)
    hub = {name: list(rule.shape) for rule in table for name in rule.names}
    copies = {name for rule in table for name in rule.copies}  # a tied head may be listed
    assert hub == {name: shape for name, shape in names.values() if name not in copies}
    (tmp_path / "model.safetensors").symlink_to(folder.resolve() / "checkpoint_hub_layout.safetensors")
    tensors, (tower, text) = dict(Tensors(tmp_path)), qwen3_vl.PUBLISHED
    moved = {
        name.replace(tower, prefixes[0], 1) if name.startswith(tower) else name.replace(text, prefixes[1], 1): x
        for name, x in tensors.items()
    }
    assert qwen3_vl.layout(moved) == prefixes
    for path, leaf in flatten(from_arrays(model.vlm.config, moved)).items():
        np.testing.assert_array_equal(leaf, flatten(model.params)[path], strict=True, err_msg=path)
