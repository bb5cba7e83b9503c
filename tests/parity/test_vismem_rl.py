"""Advantages, penalties, loss and released rewards of VisMem equal the reference numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.rl.advantages import group_advantages
from vlmem_jax.rl.loss import grpo_loss, k3
from vlmem_jax.rl.plays.penalties import invocation_reward, negative_penalty, type_penalty
from vlmem_jax.scoring import answers

CLOSE = dict(rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def grpo(golden):
    with np.load(golden / "vismem" / "grpo.npz") as file:
        return dict(file)


def test_penalties_and_reward(grpo):
    score, other, invoked = grpo["score"], grpo["score_reversed"], grpo["has_invocation"]
    np.testing.assert_allclose(type_penalty(score, other, invoked), grpo["p_type"], **CLOSE)
    np.testing.assert_allclose(negative_penalty(score, invoked), grpo["p_neg"], **CLOSE)
    reward = invocation_reward(score, grpo["score_base"][None], other, invoked, float(grpo["alpha"]))
    np.testing.assert_allclose(reward, grpo["reward"], **CLOSE)


def test_advantages(grpo):
    eps = float(grpo["eps"])
    np.testing.assert_allclose(group_advantages(grpo["reward"][None], eps=eps)[0], grpo["advantage"], **CLOSE)
    gain = grpo["score"] - grpo["score_base"]
    np.testing.assert_allclose(group_advantages(gain[None], eps=eps)[0], grpo["advantage_stage1"], **CLOSE)


def test_loss(grpo):
    with jax.enable_x64(True):
        logp, old, ref, mask = (jnp.asarray(grpo[key]) for key in ("logp", "logp_old", "logp_ref", "loss_mask"))
        advantage = jnp.broadcast_to(grpo["advantage"][:, None], logp.shape)
        weight = mask / mask.sum(1, keepdims=True)
        beta, clip = float(grpo["beta"]), float(grpo["clip"])
        np.testing.assert_allclose(k3(logp, ref), grpo["kl_token"], **CLOSE)
        np.testing.assert_allclose(jnp.exp(logp - old), grpo["ratio"], **CLOSE)
        loss, _ = grpo_loss(logp, old, ref, advantage, weight, beta, clip)
        np.testing.assert_allclose(loss / len(logp), grpo["loss"], **CLOSE)
        rows = [grpo_loss(*row, beta, clip)[0] for row in zip(logp, old, ref, advantage, weight, strict=True)]
        np.testing.assert_allclose(-jnp.stack(rows), grpo["per_trajectory"], **CLOSE)
        by_token = grpo_loss(logp, old, ref, advantage, mask, beta, clip)[1]["kl"] / mask.sum()
        np.testing.assert_allclose(by_token, grpo["kl_mean"], **CLOSE)


def test_released_rewards(golden):
    for case in json.loads((golden / "vismem" / "rewards.json").read_text()):
        got = answers.exact(case["pred"], case["ref"]), answers.substr(case["pred"], case["ref"])
        assert got == (case["exact"], case["substr"]), case
