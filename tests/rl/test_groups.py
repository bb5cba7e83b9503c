"""A group in one row: what it gives is what rows of their own give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn, patches_world
from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid, sequence_positions
from vlmem_jax.rl.groups import Answer, GroupShape, pack_group
from vlmem_jax.train.loss import log_probs, log_probs_where
from vlmem_jax.types import IGNORED, Sample

TOKENS = 96
LENGTHS = (5, 1, 9, 3)
DATA = DataConfig(loss_weight="sample")
CONTEXT_ID = 100
"""Placeholder in prompts of tiles."""

MODELS = {
    "tiles": {"preset": "tiny", "memory": None},
    "tiles with a memory": {"preset": "tiny"},
    "M-RoPE": {"preset": "tiny_qwen2_5_vl", "memory": None},
    "M-RoPE with a memory": {"preset": "tiny_qwen2_5_vl", "memory": {"kind": "comemo", "every": 2}},
    "DeepStack": {"preset": "tiny_qwen3_vl", "memory": None},
}


def model(name):
    vlm = VLM(resolve(MODELS[name] | {"compute_dtype": "float32"}))
    params = drawn.params(vlm, 1)
    if "memory" in params:  # gates that are 0 would hide it
        blocks = params["memory"]["blocks"]
        opened = {gate: jnp.full_like(blocks[gate], 0.7) for gate in ("attn_gate", "mlp_gate")}
        params = params | {"memory": {"blocks": blocks | opened}}
    return vlm, params


def prompt_of(vlm, shown=True):
    """A prompt with an image and a video, or of one that is cut in tiles, or of text alone."""
    if vlm.tile.layout:
        return patches_world.sample(vlm, [PatchGrid(1, 2, 3), PatchGrid(2, 2, 2, 1.0)] if shown else [], 7)
    rng = np.random.default_rng(0)
    P, side = vlm.tile.tokens, vlm.tile.side
    tiles = 3 if shown else 0
    tokens_T = np.concatenate([[5, 6], np.full(tiles * P, CONTEXT_ID), rng.integers(5, 100, 6)]).astype(np.int32)
    grids = [(2, 1)] if shown else []
    positions_T, visual_positions_M = sequence_positions(tokens_T, grids, int(P**0.5), CONTEXT_ID)
    is_visual_T = tokens_T == CONTEXT_ID
    return Sample(
        tokens_T=tokens_T,
        labels_T=np.full_like(tokens_T, IGNORED),
        positions_T=positions_T,
        visual_index_T=np.where(is_visual_T, np.cumsum(is_visual_T) - 1, -1).astype(np.int32),
        pixels_ISSc=rng.integers(0, 256, (tiles, side, side, vlm.tile.channels)).astype(np.uint8),
        visual_positions_M=visual_positions_M,
    )


def answers():
    rng = np.random.default_rng(1)
    drawn_by_policy = [np.arange(length) != 2 for length in LENGTHS]  # the third token was put there
    return [Answer(rng.integers(5, 100, len(loss)).astype(np.int32), loss) for loss in drawn_by_policy]


def apart(vlm, prompt, tiles):
    """The same answers in rows of their own."""
    rows = []
    for answer in answers():
        count, axes = len(answer.tokens_T), prompt.positions_T.shape[1:]
        after = np.ones((count, *axes), np.int32).cumsum(0) + prompt.positions_T.max()
        labels_T = np.where(answer.loss_T, answer.tokens_T, IGNORED)
        sample = dataclasses.replace(
            prompt,
            tokens_T=np.concatenate([prompt.tokens_T, answer.tokens_T]),
            labels_T=np.concatenate([np.full_like(prompt.tokens_T, IGNORED), labels_T]).astype(np.int32),
            positions_T=np.concatenate([prompt.positions_T, after]).astype(np.int32),
            visual_index_T=np.concatenate([prompt.visual_index_T, np.full(count, -1, np.int32)]),
        )
        rows.append(pack_row([sample], DATA, vlm.tile, TOKENS, tiles))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def scored(vlm, params, batch):
    """Log-probabilities of targets, and what descends on their weighted sum."""

    def total(params):
        logp_BT = log_probs(vlm.hidden(params, batch), vlm.head_kernel(params), batch.text.targets_BT, 32)
        return (batch.text.weights_BT * logp_BT).sum(), logp_BT

    return jax.jit(jax.grad(total, has_aux=True))(params)


@pytest.mark.parametrize("name, shown", [*((name, True) for name in MODELS), ("tiles", False), ("M-RoPE", False)])
def test_a_group_has_the_log_probs_and_gradients_of_rows_of_their_own(name, shown):
    vlm, params = model(name)
    prompt = prompt_of(vlm, shown)
    tiles = max(len(prompt.pixels_ISSc), 1) + 1
    group = pack_group(prompt, answers(), vlm, GroupShape(TOKENS, tiles), DATA)
    gradients, logp_BT = scored(vlm, params, patches_world.one_row(group.batch))
    wanted_gradients, wanted_BT = scored(vlm, params, apart(vlm, prompt, tiles))
    first = len(prompt.tokens_T) - 1
    for row, slots in enumerate(group.answers):
        drawn_T = answers()[row].loss_T
        own_T = wanted_BT[row, first : first + LENGTHS[row]]
        np.testing.assert_allclose(logp_BT[0, slots][drawn_T], own_T[drawn_T], atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_gradients))
    assert largest > 1e-2
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(largest, 1)),
        gradients,
        wanted_gradients,
    )


def test_an_answer_knows_nothing_of_another():
    vlm, params = model("tiles")
    group = pack_group(prompt_of(vlm), answers(), vlm, GroupShape(TOKENS, 4), DATA)
    batch = patches_world.one_row(group.batch)
    changed = batch.replace(tokens_BT=batch.text.tokens_BT.at[0, group.answers[0]].add(1))
    hidden = jax.jit(vlm.hidden)
    before_BTD, after_BTD = hidden(params, batch), hidden(params, changed)
    others = slice(group.answers[1].start, group.answers[-1].stop)
    np.testing.assert_array_equal(before_BTD[0, others], after_BTD[0, others])
    assert not np.allclose(before_BTD[0, group.answers[0]], after_BTD[0, group.answers[0]])


def test_only_tokens_that_count_are_scored():
    vlm, params = model("tiles")
    batch = pack_group(prompt_of(vlm), answers(), vlm, GroupShape(TOKENS, 4), DATA).batch
    text = jax.tree.map(lambda x: jnp.asarray(x[None]), batch.text)
    hidden_BTD = jax.random.normal(jax.random.key(0), (1, TOKENS, vlm.config.decoder.width))
    counts_BT, kernel_DV = text.weights_BT > 0, vlm.head_kernel(params)
    room = int(counts_BT.sum()) + 3

    def some(hidden_BTD):
        return log_probs_where(hidden_BTD, kernel_DV, text.targets_BT, counts_BT, room, 8)

    def all_of_them(hidden_BTD):
        return jnp.where(counts_BT, log_probs(hidden_BTD, kernel_DV, text.targets_BT, 8), 0)

    np.testing.assert_allclose(some(hidden_BTD), all_of_them(hidden_BTD), atol=1e-5)
    ours, theirs = (jax.grad(lambda x, of=of: (of(x) ** 2).sum())(hidden_BTD) for of in (some, all_of_them))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_what_is_known_of_tokens_stands_where_they_are_targets():
    vlm, _ = model("tiles")
    group = pack_group(prompt_of(vlm), answers(), vlm, GroupShape(TOKENS, 4), DATA)
    known_T = group.spread([answer.tokens_T for answer in answers()])
    np.testing.assert_array_equal(known_T, group.batch.text.targets_BT)
    assert group.batch.text.weights_BT.sum() == pytest.approx(len(LENGTHS))  # each answer counts as one


def test_a_group_that_does_not_fit_is_refused():
    vlm, _ = model("tiles")
    prompt = prompt_of(vlm)
    with pytest.raises(ValueError, match="it has 20 token slots and 3 tile slots"):
        pack_group(prompt, answers(), vlm, GroupShape(20, 3), DATA)
    with pytest.raises(ValueError, match="must have tokens"):
        pack_group(prompt, [Answer(np.zeros(0, np.int32), np.zeros(0, bool))], vlm, GroupShape(TOKENS, 4), DATA)
    longer = VLM(resolve({"preset": "tiny", "memory": None, "decoder": {"ntk_factor": 2.0, "max_positions": 16}}))
    with pytest.raises(ValueError, match="model.decoder.max_positions=16"):
        pack_group(prompt, answers(), longer, GroupShape(TOKENS, 4), DATA)
