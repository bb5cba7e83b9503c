"""Answers without memory and with reversed kinds: which are drawn, and what the rewards make of them."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.rl import memory_world, world
from vlmem_jax.config import override
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPO
from vlmem_jax.rl.actor import Actor
from vlmem_jax.rl.plays import WithMemories
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh
from vlmem_jax.train.config import experiment

G = 4


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    config = memory_world.config(tmp_path_factory.mktemp("world"))
    base = {
        "model.decoder.layers": 1, "stages.1.task.kl": 0.0,
        "stages.1.task.rewards": [{"name": "tests.rl.own:length"}],
    }  # fmt: skip
    return lambda **keys: experiment(override(config, {**base, **{f"stages.1.task.{k}": v for k, v in keys.items()}}))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.1, 1), (0.25, 1), (0.6, 3), (1.0, 4)])
def test_which_are_drawn_again_is_a_function_of_seed_and_phase(make, fraction, count):
    drawn = []
    for seed in (1, 2):
        config = dataclasses.replace(make(rev_fraction=fraction), seed=seed)
        play = WithMemories(config, config.stages[1], VLM(config.model))
        for phase in (0, 1):
            drawn.append(play.drawn_again(phase, 50))
            assert np.array_equal(play.drawn_again(phase, 50), drawn[-1])
    for n, chosen_Pg in enumerate(drawn):
        assert chosen_Pg.shape == (50, count) and (np.diff(chosen_Pg, axis=1) > 0).all()
        if 0 < count < G:
            assert set(chosen_Pg.ravel()) == set(range(G))
            assert not any(np.array_equal(chosen_Pg, other) for other in drawn[:n])


def test_bases_in_pairs_and_a_part_drawn_again(make, mesh, monkeypatch):
    config = make(rev_fraction=0.5, paired_base=True, advantage_std=False)
    task = GRPO(config, config.stages[1], VLM(config.model), mesh)
    calls, answer = [], Actor.answer

    def recording(*args, **kwargs):
        calls.append(answer(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(Actor, "answer", recording)
    rng = np.random.default_rng(0)
    shapes = task.model.abstract()
    params = jax.tree.map(lambda leaf: np.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)
    params["memory"]["invoke_logit_bias"] = np.full((1,), 3.0, np.float32)
    with jax.set_mesh(mesh):
        work = task.work(0, jax.device_put(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())))
    task.close()
    (groups, scores), (bases, base_scores), (turned, turned_scores) = calls
    speech, chosen_Pg = task.model.speech, task._play.drawn_again(0, 2)
    assert [len(group) for group in bases] == [G, G] and [len(group) for group in turned] == [2, 2]
    invoked_PG = np.array([[bool(t.invocations) for t in group] for group in groups])
    assert invoked_PG.any() and np.take_along_axis(invoked_PG, chosen_Pg, axis=1).any()
    for group, own in zip(groups, bases, strict=True):
        for t, base in zip(group, own, strict=True):
            until = t.invocations[0].place - 1 if t.invocations else len(t.tokens_T)
            assert base.tokens_T[:until].tolist() == t.tokens_T[:until].tolist(), "the draws are the same"
            assert not np.isin(base.tokens_T, speech.invoke_ids + speech.end_ids).any()
    for n, row in enumerate(chosen_Pg):
        for g, other in zip(row, turned[n], strict=True):
            t = groups[n][g]
            if t.invocations:
                end = t.invocations[0].place
                assert other.tokens_T[:end].tolist() == t.tokens_T[:end].tolist()
                assert other.tokens_T[end] == speech.end_ids[1 - t.invocations[0].kind]
            else:
                assert other.tokens_T.tolist() == t.tokens_T.tolist()
    S, base, rev = (x.of_all.reshape(2, -1) for x in (scores, base_scores, turned_scores))
    rewards = S - base
    for n in range(2):
        for g in np.flatnonzero(invoked_PG[n]):
            rewards[n, g] -= 0.3 * max(S[n].mean() - S[n, g], 0)
            if g in chosen_Pg[n]:
                rewards[n, g] -= 0.3 * max(rev[n, chosen_Pg[n].tolist().index(g)] - S[n, g], 0)
    advantages = [lesson.advantage for lesson in task._phases.lessons]
    np.testing.assert_allclose(advantages, (rewards - rewards.mean(1, keepdims=True)).ravel(), atol=1e-9)
    assert work.numbers["score/base"] == pytest.approx(base.mean())


def test_a_run_stopped_in_midst_of_a_phase_goes_on_with_its_memories(make, mesh, tmp_path):
    """What they heard is in the checkpoint."""
    config = make()
    task = {"minibatches": 2, "rewards": [{"name": "tests.rl.own:length"}]}
    formation = dataclasses.replace(config.stages[0], steps=4, task={**config.stages[0].task, **task})
    keep = dataclasses.replace(config.checkpoint, content="all")
    config = dataclasses.replace(config, stages=(formation,), checkpoint=keep)
    world.train(config, tmp_path / "whole", mesh)
    for stop in (0, 2, None):
        world.train(config, tmp_path / "parts", mesh, until=stop)
    whole = world.numbers(tmp_path / "whole")
    assert len(whole) == 4 and all(line["memory/answers"] for line in whole) and whole[-1]["grad_norm"]
    assert world.numbers(tmp_path / "parts") == whole
