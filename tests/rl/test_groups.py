"""A group in one row: what it gives is what rows of their own give."""

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
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.groups import Group, pack_groups
from vlmem_jax.train.loss import log_probs
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


def answers(prompt, seed=1):
    """The prompt with each answer behind it."""
    rng, samples = np.random.default_rng(seed), []
    for count in LENGTHS:
        drawn_by_policy = np.arange(count) != 2  # the third token was put there
        step = Step(
            prompt, rng.integers(5, 100, count).astype(np.int32), np.zeros(count, np.float32), drawn_by_policy, False
        )
        samples.append(step.sample())
    return samples


def apart(vlm, samples, tiles):
    """The same answers in rows of their own."""
    rows = [pack_row([sample], DATA, vlm.tile, TOKENS, tiles) for sample in samples]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def scored(vlm, params, batch):
    """Log-probabilities of targets, and what descends on their weighted sum."""

    def total(params):
        logp_BT = log_probs(vlm.hidden(params, batch), vlm.head_kernel(params), batch.text.targets_BT, 32)
        return (batch.text.weights_BT * logp_BT).sum(), logp_BT

    return jax.jit(jax.grad(total, has_aux=True))(params)


@pytest.mark.parametrize("name, shown", [*((name, True) for name in MODELS), ("tiles", False), ("M-RoPE", False)])
def test_groups_have_the_log_probs_and_gradients_of_rows_of_their_own(name, shown):
    """Two of them, that share a row."""
    vlm, params = model(name)
    prompts = prompt_of(vlm, shown), prompt_of(vlm, not shown)
    groups = [Group(prompt, answers(prompt, n)) for n, prompt in enumerate(prompts)]
    tiles = 1 + max(len(prompt.pixels_ISSc) for prompt in prompts)
    batch, places = pack_groups(groups, DATA, vlm.tile, 2 * TOKENS, tiles)
    gradients, logp_BT = scored(vlm, params, patches_world.one_row(batch))
    samples = [sample for group in groups for sample in group.answers]
    wanted_gradients, wanted_BT = scored(vlm, params, apart(vlm, samples, tiles))
    firsts = [len(group.prompt.tokens_T) - 1 for group in groups for _ in group.answers]
    for row, (slots, first, sample) in enumerate(zip(places, firsts, samples, strict=True)):
        drawn_T = sample.labels_T[first + 1 :] != IGNORED
        own_T = wanted_BT[row, first : first + len(drawn_T)]
        np.testing.assert_allclose(logp_BT[0, slots][drawn_T], own_T[drawn_T], atol=1e-5)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted_gradients))
    assert largest > 1e-2
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(largest, 1)),
        gradients,
        wanted_gradients,
    )


def one_group(vlm):
    prompt = prompt_of(vlm)
    batch, places = pack_groups([Group(prompt, answers(prompt))], DATA, vlm.tile, TOKENS, 4)
    return patches_world.one_row(batch), places


def test_an_answer_knows_nothing_of_another():
    vlm, params = model("tiles")
    batch, places = one_group(vlm)
    changed = batch.replace(tokens_BT=batch.text.tokens_BT.at[0, places[0]].add(1))
    hidden = jax.jit(vlm.hidden)
    before_BTD, after_BTD = hidden(params, batch), hidden(params, changed)
    others = slice(places[1].start, places[-1].stop)
    np.testing.assert_array_equal(before_BTD[0, others], after_BTD[0, others])
    assert not np.allclose(before_BTD[0, places[0]], after_BTD[0, places[0]])


def test_targets_stand_where_they_are_foretold_and_each_answer_counts_as_one():
    vlm, _ = model("tiles")
    batch, places = one_group(vlm)
    samples = answers(prompt_of(vlm))
    for slots, sample, length in zip(places, samples, LENGTHS, strict=True):
        labels_T = sample.labels_T[-length:]
        np.testing.assert_array_equal(batch.text.targets_BT[0, slots], np.where(labels_T == IGNORED, 0, labels_T))
        assert batch.text.weights_BT[0, slots].sum() == pytest.approx(1)
    assert batch.text.weights_BT.sum() == pytest.approx(len(LENGTHS))


def test_groups_that_do_not_fit_are_refused():
    vlm, _ = model("tiles")
    prompt = prompt_of(vlm)
    group = Group(prompt, answers(prompt))
    with pytest.raises(ValueError, match="it has 20 token slots and 3 tile slots"):
        pack_groups([group], DATA, vlm.tile, 20, 3)
    with pytest.raises(ValueError, match="must have tokens"):
        pack_groups([Group(prompt, [prompt])], DATA, vlm.tile, TOKENS, 4)
