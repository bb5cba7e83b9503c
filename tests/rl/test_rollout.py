"""What was drawn is what is trained on: log-probabilities and positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import patches_world
from tests.drawn import random_params
from tests.rl.packed import packed
from vlmem_jax.data import DataConfig
from vlmem_jax.families import resolve
from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.rl import GRPOLoss, RLConfig
from vlmem_jax.rl.episodes import Step
from vlmem_jax.rl.rollout import rollout_keys, rollouts
from vlmem_jax.rl.rows import RowShape, pack_steps
from vlmem_jax.types import Sample

BANNED, STOP, G = (3, 4, 60), (1, 2, *range(90, 100)), 3
SAMPLING = SamplingConfig(max_new_tokens=12, temperature=1.5, top_k=100)
DATA = DataConfig(pack_tokens=128, pack_tiles=16, loss_weight="sample")


def tiles(vlm, length, count, seed):
    """A prompt of `length` random tokens and `count` random tiles after its third."""
    rng = np.random.default_rng(seed)
    size, m = vlm.config.vision.image_size, count * vlm.tokens_per_tile
    visual_index_T = np.full(length + m, -1, np.int32)
    visual_index_T[3 : 3 + m] = np.arange(m)
    return Sample(
        tokens_T=rng.integers(5, 90, length + m).astype(np.int32),
        labels_T=np.full(length + m, -100, np.int32),
        positions_T=np.arange(length + m, dtype=np.int32),
        visual_index_T=visual_index_T,
        pixels_ISSc=rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8),
        visual_positions_M=np.arange(3, 3 + m, dtype=np.int32),
        name=f"prompt {seed}",
    )


@pytest.fixture(scope="module", params=["comemo", "qwen2_5_vl"])
def drawn(request):
    """Model, parameters, generator, prompts and three answers to each."""
    if request.param == "comemo":
        vlm = VLM(resolve({"preset": "tiny", "decoder": {"layers": 2}, "vision": {"layers": 1}}))
        prompts = [tiles(vlm, 9, 2, 0), tiles(vlm, 20, 0, 1), tiles(vlm, 12, 1, 2)]
    else:
        vlm = VLM(resolve({"preset": "tiny_qwen2_5_vl", "decoder": {"layers": 2}}))
        grids = [[PatchGrid(1, 2, 3)], [], [PatchGrid(2, 2, 2, 1.0)]]
        prompts = [patches_world.sample(vlm, shown, 9 + 3 * n, n) for n, shown in enumerate(grids)]
    params = random_params(vlm)
    for gate in ("attn_gate", "mlp_gate") if vlm.config.memory_kind == "comemo" else ():
        params["memory"]["blocks"][gate] += 0.7
    params = jax.device_put(params)
    generator = Generator(vlm, params, stop_ids=STOP, banned_ids=BANNED)
    keys_PG = rollout_keys(0, 1, 2, len(prompts), G)
    groups = dict(rollouts(generator, prompts, SAMPLING, keys_PG, rows=100))
    return vlm, params, generator, prompts, keys_PG, [groups[n] for n in range(len(prompts))]


def log_probs(vlm, params, trajectories):
    """What the trainer makes of the log-probabilities of trajectories, and the rows they are packed in."""
    rows = packed(trajectories, [1.0] * len(trajectories), DATA, vlm, at_once=1)
    loss = GRPOLoss(vlm, RLConfig(), chunk=32, banned_ids=BANNED)
    scored = jax.jit(lambda params, batch: jax.lax.map(lambda part: loss.log_probs(params, part), batch))
    return np.asarray(scored(params, jax.tree.map(jnp.asarray, rows.batch))), rows


def test_the_sampler_and_the_trainer_give_the_same_log_probabilities(drawn):
    vlm, params, _, _, _, groups = drawn
    trajectories = [trajectory for group in groups for trajectory in group]
    assert {t.stopped for t in trajectories} == {True, False} and len({len(t.tokens_T) for t in trajectories}) > 2
    logp_BT, rows = log_probs(vlm, params, trajectories)
    counts_BT = rows.batch.text.weights_BT > 0
    assert counts_BT.sum() == sum(len(t.tokens_T) for t in trajectories), "of each token drawn, the stop id too"
    assert (rows.batch.text.segments_BT.max(-1) > 1).any(), "some rows hold several trajectories"
    np.testing.assert_allclose(logp_BT[counts_BT], rows.old_logp_BT[counts_BT], atol=1e-5)
    np.testing.assert_allclose(rows.batch.text.weights_BT.sum(), len(trajectories), rtol=1e-6)
    assert not np.isin(np.concatenate([t.tokens_T for t in trajectories]), BANNED).any()


def test_a_trajectory_does_not_depend_on_its_batch(drawn):
    _, _, generator, prompts, keys_PG, groups = drawn
    for n, group in rollouts(generator, prompts[:2], SAMPLING, keys_PG[:2], rows=1):
        for alone, together in zip(group, groups[n], strict=True):
            np.testing.assert_array_equal(alone.tokens_T, together.tokens_T)
            assert alone.stopped == together.stopped == bool(np.isin(alone.tokens_T[-1], STOP))
            assert not np.isin(alone.output_T, STOP).any()
    assert len({tuple(t.tokens_T) for group in groups for t in group}) == 9, "each is drawn by a key of its own"


def test_rows_keep_what_is_known_of_each_token(drawn):
    vlm, _, _, prompts, _, groups = drawn
    first, second = (max(group, key=lambda t: len(t.tokens_T)) for group in groups[:2])
    forced_T = np.arange(len(first.tokens_T)) == 0
    first = dataclasses.replace(first, loss_T=~forced_T)
    rows = packed([first, second], [0.5, -2.0], DATA, vlm, at_once=2, beta=0.1)
    assert rows.advantage_BT.shape == (1, 2, 128)
    for trajectory, advantage in ((first, 0.5), (second, -2.0)):
        row, span = _find(rows, trajectory)
        kept = trajectory.loss_T
        np.testing.assert_array_equal(rows.batch.text.targets_BT[0, row, span], np.where(kept, trajectory.tokens_T, 0))
        np.testing.assert_array_equal(rows.old_logp_BT[0, row, span], np.where(kept, trajectory.logp_T, 0))
        np.testing.assert_array_equal(rows.advantage_BT[0, row, span], np.where(kept, advantage, 0))
        np.testing.assert_allclose(rows.batch.text.weights_BT[0, row, span], kept / kept.sum(), rtol=1e-6)
    assert (
        (rows.advantage_BT != 0).sum()
        == (rows.batch.text.weights_BT > 0).sum()
        == first.loss_T.sum() + len(second.tokens_T)
    )
    assert rows.beta_B.tolist() == [[np.float32(0.1)] * 2]


def _find(rows, trajectory):
    """Row and slots of a trajectory: the last token of its prompt, and its own but for the last."""
    tokens_T = np.concatenate([trajectory.prompt.tokens_T[-1:], trajectory.tokens_T[:-1]])
    for row, tokens in enumerate(rows.batch.text.tokens_BT[0]):
        for start in range(len(tokens) - len(tokens_T) + 1):
            span = slice(start, start + len(tokens_T))
            is_answer = (rows.batch.text.prefix_BT[0, row, span] > 0).all()
            if is_answer and (tokens[span] == tokens_T).all():
                return row, span
    raise AssertionError("not in the rows")


def test_a_step_that_collapsed_is_counted_and_skipped(drawn):
    vlm, params, _, _, _, groups = drawn
    whole, other = groups[0][0], groups[1][0]
    collapsed = dataclasses.replace(whole, logp_T=whole.logp_T + np.float32(30))
    objective = GRPOLoss(vlm, RLConfig(), chunk=32, banned_ids=BANNED)
    learn = jax.jit(jax.value_and_grad(objective.loss, has_aux=True), static_argnums=2)
    found = []
    for steps in ([collapsed, other], [dataclasses.replace(whole, loss_T=np.zeros_like(whole.loss_T)), other]):
        rows = packed(steps, [1.0, -1.0], DATA, vlm, at_once=1)
        found.append(learn(params, jax.tree.map(lambda x: jnp.asarray(x[0]), rows), None))
    ((loss, sums), slopes), ((alone, _), expected) = found
    assert sums["collapsed"] == pytest.approx(1) and loss == pytest.approx(alone) != 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slopes, expected)


def test_shapes_are_those_of_the_config_whatever_was_drawn():
    vlm = VLM(resolve({"preset": "tiny", "memory": None}))
    prompts, rng = [tiles(vlm, 10, n, n) for n in range(3)], np.random.default_rng(0)
    shapes = set()
    for _ in range(30):
        lengths = rng.integers(1, 100, rng.integers(1, 20))
        trajectories = [
            Step(prompts[n % 3], np.ones(n, np.int32), np.zeros(n, np.float32), np.ones(n, bool), False)
            for n in lengths
        ]
        parts = pack_steps(trajectories, [0.0] * len(lengths), DATA, vlm, RowShape.of(DATA, vlm, 100), at_once=2)
        assert sum((part.batch.text.weights_BT > 0).sum() for part in parts) == lengths.sum()
        shapes |= {tuple(x.shape for x in jax.tree.leaves(part)) for part in parts}
    assert len(shapes) == 1
    empty = packed([], [], DATA, vlm, at_once=2)
    assert empty.advantage_BT.shape == (1, 2, 128) and not empty.batch.text.segments_BT.any()
    without = packed([], [], dataclasses.replace(DATA, pack_tiles=0), vlm)
    assert without.batch.views.pixels_BISSc.shape[2] == 0, "text alone has no vision tower"


def test_steps_behind_a_prompt_share_it_in_as_many_rows_as_they_need():
    vlm = VLM(resolve({"preset": "tiny", "memory": None}))
    prompts = [tiles(vlm, 30, 1, n) for n in range(2)]
    counts = [20, 30, 40, 25, 5, 60]
    steps = [
        Step(prompts[n // 4], np.full(count, n + 5, np.int32), np.zeros(count, np.float32), np.ones(count, bool), False)
        for n, count in enumerate(counts)
    ]
    rows = packed(steps, range(1, 7), DATA, vlm)
    text = jax.tree.map(lambda x: x[:, 0], rows.batch.text)
    prefix = 29 + vlm.tokens_per_tile
    assert len(text.tokens_BT) == 3, "a prompt and 115 tokens fill two rows, another and 65 one"
    for row, (segments_T, prefix_T) in enumerate(zip(text.segments_BT, text.prefix_BT, strict=True)):
        assert (segments_T[prefix_T == 0] > 0).sum() == prefix, f"row {row} has its prompt once"
    advantages = rows.advantage_BT[:, 0]
    assert {n: int((advantages == n).sum()) for n in range(1, 7)} == dict(enumerate(counts, 1))
    for row_T, targets_T in zip(advantages, text.targets_BT, strict=True):
        np.testing.assert_array_equal(targets_T[row_T > 0], row_T[row_T > 0] + 4)


def test_a_step_that_no_row_has_room_for_is_refused():
    vlm = VLM(resolve({"preset": "tiny", "memory": None}))
    step = Step(tiles(vlm, 29, 0, 7), np.ones(100, np.int32), np.zeros(100, np.float32), np.ones(100, bool), False)
    with pytest.raises(ValueError, match=r"has 128 tokens and 16 tiles for 129 and 0 \(sample prompt 7\); raise data"):
        packed([step], [0.0], DATA, vlm, at_once=2)


def test_keys_are_those_of_seed_stage_phase_prompt_and_sample():
    def data(*args):
        return jax.random.key_data(rollout_keys(*args)).tolist()

    assert data(0, 1, 2, 3, 4) == data(0, 1, 2, 3, 4)
    several = [data(0, 1, 2, 3, 4), data(1, 1, 2, 3, 4), data(0, 2, 2, 3, 4), data(0, 1, 3, 3, 4)]
    flat = [tuple(key) for keys in several for row in keys for key in row]
    assert len(set(flat)) == len(flat) == 48
