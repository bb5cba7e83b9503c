"""GRPO with a memory that speaks: memories are formed again where they stood, and only drawn tokens teach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.drawn import random_params
from tests.patches_world import sample
from tests.rl.packed import packed
from vlmem_jax.data import DataConfig
from vlmem_jax.families import resolve
from vlmem_jax.generate import Generator, InvocationConfig, SamplingConfig
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.rl import GRPOLoss, RLConfig
from vlmem_jax.rl.rollout import rollout_keys, rollouts
from vlmem_jax.trees import flatten

G, BANNED, STOP = 2, (3, 4), (1, *range(90, 100))
SAMPLING = SamplingConfig(max_new_tokens=14, temperature=1.0)
DATA = DataConfig(pack_tokens=384, pack_tiles=64, loss_weight="sample")
CALLED = InvocationConfig("delimiter_random", probability=0.4, anywhere=0.1)


def model(former, preset="tiny_qwen2_5_vl"):
    memory = {"kind": "vismem", "former": former, "vision_layer": 1}
    return VLM(resolve({"preset": preset, "memory": memory, "decoder": {"layers": 2}}))


def with_calls(vlm):
    """Adapters have an effect; latent tokens and embeddings are of one size; calls are likely."""
    params = random_params(vlm)
    params["decoder"]["embed"] *= 6
    params["decoder"]["norm"]["scale"] *= 0.1
    memory = params["memory"]
    for kind in ("short", "long"):
        for adapter in memory[kind]["lora"].values():
            adapter["b"] *= 3
    memory["special_out"] *= 6
    memory["invoke_logit_bias"][:] = 3.0
    return jax.device_put(params)


def sampler(vlm, params):
    return Generator(vlm, params, stop_ids=STOP, banned_ids=BANNED, delimiter_ids=range(0, 160, 2))


def drawer(generator, prompts):
    """Groups of trajectories of all prompts, under a config."""

    def run(config, forced=()):
        keys_PG = rollout_keys(0, 1, 2, len(prompts), G)
        groups = dict(rollouts(generator, prompts, SAMPLING, keys_PG, 100, config, forced, record=True))
        return [groups[n] for n in range(len(prompts))]

    return run


@pytest.fixture(scope="module")
def vlm():
    return model("lora_llm")


@pytest.fixture(scope="module")
def params(vlm):
    return with_calls(vlm)


@pytest.fixture(scope="module")
def generator(vlm, params):
    return sampler(vlm, params)


@pytest.fixture(scope="module")
def prompts(vlm):
    return prompts_of(vlm)


def prompts_of(vlm):
    grids = [[PatchGrid(1, 3, 4)], [], [PatchGrid(2, 2, 3, 0.5)]]
    return [sample(vlm, grid, (40, 9, 13)[n], seed=n) for n, grid in enumerate(grids)]


@pytest.fixture(scope="module")
def draw(generator, prompts):
    return drawer(generator, prompts)


@pytest.fixture(scope="module", params=["learned", "called"])
def drawn(request, draw):
    """A config and all trajectories under it."""
    config = InvocationConfig() if request.param == "learned" else CALLED
    return config, [trajectory for group in draw(config) for trajectory in group]


def grpo(vlm, config):
    return GRPOLoss(vlm, RLConfig(), 32, BANNED + config.banned_ids(vlm.speech))


@pytest.fixture(scope="module")
def objective(vlm):
    return lambda config: grpo(vlm, config)


def test_the_sampler_and_the_trainer_give_the_same_log_probabilities(vlm, params, drawn):
    check_log_probabilities(vlm, params, *drawn)


@pytest.mark.parametrize("preset", ["tiny_qwen2_5_vl", "tiny_qwen3_vl"])
def test_they_do_where_the_vision_tower_forms_memories(preset):
    vlm = model("lora_vision", preset)
    params = with_calls(vlm)
    groups = drawer(sampler(vlm, params), prompts_of(vlm))(CALLED)
    check_log_probabilities(vlm, params, CALLED, [trajectory for group in groups for trajectory in group])


def with_memories(config):
    """For rows that hold several answers, with all of their memories."""
    return RLConfig(max_new_tokens=SAMPLING.max_new_tokens, invocation=config, row_memories=16)


def check_log_probabilities(vlm, params, config, trajectories):
    assert vlm.config.memory.lora.dropout > 0, "which neither of them applies"
    kinds = [memory.kind for t in trajectories for memory in t.invocations]
    assert set(kinds) == {0, 1} and max(len(t.invocations) for t in trajectories) > 1
    rows = packed(trajectories, [1.0] * len(trajectories), DATA, vlm, config=with_memories(config))
    scored = jax.jit(lambda params, batch: jax.lax.map(lambda x: grpo(vlm, config).log_probs(params, x), batch))
    logp_BT = np.asarray(scored(params, jax.tree.map(jnp.asarray, rows.batch)))
    counts_BT = rows.batch.text.weights_BT > 0
    assert counts_BT.sum() == sum(t.loss_T.sum() for t in trajectories)
    assert (rows.batch.text.segments_BT.max(-1) > 1).any(), "some rows hold several trajectories"
    np.testing.assert_allclose(logp_BT[counts_BT], rows.old_logp_BT[counts_BT], atol=1e-5)


def test_what_was_put_there_is_not_learned(vlm, drawn):
    config, trajectories = drawn
    calls = set(vlm.speech.invoke_ids)
    for t in trajectories:
        ends = np.isin(t.tokens_T, vlm.speech.end_ids)
        assert ends.sum() == len(t.invocations) and not (ends & t.loss_T).any()
        for memory in t.invocations:
            before, end = t.tokens_T[memory.place - 1 : memory.place + 1]
            assert before == vlm.speech.invoke_ids[memory.kind] and end == vlm.speech.end_ids[memory.kind]
            assert t.loss_T[memory.place - 1] == (config.mode == "learned")
        slots = sum(vlm.speech.lengths[memory.kind] for memory in t.invocations)
        made = t.sample()
        assert len(made.tokens_T) == len(t.prompt.tokens_T) + len(t.tokens_T) + slots
        assert (made.labels_T != -100).sum() == t.loss_T.sum()
        if config.mode == "learned":
            assert t.loss_T[np.isin(t.tokens_T, list(calls))].all()


def test_gradients_reach_what_forms_memories_and_nothing_goes_into_what_they_heard(vlm, params, objective, drawn):
    config, trajectories = drawn
    rows = packed(trajectories, [1.0, -1.0] * (len(trajectories) // 2), DATA, vlm, config=with_memories(config))
    kinds = [set(kinds_BJ.ravel()) for kinds_BJ in rows.batch.text.formation.kinds_BJ]
    with_both = next(n for n, of_part in enumerate(kinds) if {0, 1} <= of_part)
    rows = jax.tree.map(lambda x: jnp.asarray(x)[with_both], rows)

    def loss(params, heard):
        batch = rows.batch.replace(formation=heard)
        return objective(config).loss(params, dataclasses.replace(rows, batch=batch), None)[0]

    by_params, by_heard = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, rows.batch.text.formation)
    flat = flatten(by_params["memory"])
    for path in ("query_builder/q_init", "short/m_init", "long/m_init", "short/lora/q/b", "long/lora/q/a"):
        assert float(jnp.abs(flat[path]).max()) > 0, path
    assert not jnp.abs(by_heard.states_BJLD).max()
    learned = float(jnp.abs(flat["special_out"]).max()), float(jnp.abs(flat["invoke_logit_bias"]).max())
    assert (min(learned) > 0) == (config.mode == "learned")


def test_reversed_trajectories_begin_alike_and_take_the_other_kind(draw, generator):
    config = InvocationConfig()
    groups = draw(config)
    begun = [[t.tokens_T[: t.invocations[0].place].tolist() if t.invocations else [STOP[0]] for t in g] for g in groups]
    turned = draw(dataclasses.replace(config, reverse_types=True), begun)
    told = 0
    for group, others, starts in zip(groups, turned, begun, strict=True):
        for t, other, ids in zip(group, others, starts, strict=True):
            assert other.tokens_T[: len(ids)].tolist() == ids and not other.loss_T[: len(ids)].any()
            if t.invocations:
                told += 1
                assert other.invocations[0].kind == 1 - t.invocations[0].kind
                assert np.array_equal(other.invocations[0].states_LD, t.invocations[0].states_LD)
            else:
                assert len(other.tokens_T) == 1 and other.stopped
    assert told
