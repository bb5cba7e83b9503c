import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.verbs import extended
from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.generate.loop import FINISHED, compiled
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.runtime.compiler import OPTIONS
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings
from vlmem_jax.types import Sample

GREEDY = SamplingConfig(max_new_tokens=10)
SAMPLED = SamplingConfig(max_new_tokens=10, temperature=1.0, top_k=40, top_p=0.9, seed=3)


@pytest.fixture(scope="module")
def generator(vlm, params):
    return Generator(vlm, params, stop_ids=[1])


@pytest.fixture(scope="module")
def prompts(make_prompt):
    """Unequal lengths and tile counts, one of them without any image."""
    return [make_prompt(9, 1, seed=0), make_prompt(30, 0, seed=1), make_prompt(14, 2, seed=2)]


def test_incremental_decoding_equals_full_forward(vlm, params, generator, make_prompt):
    prompt = make_prompt(9, 2)
    [answer] = generator.generate([prompt], GREEDY)
    assert len(answer) == GREEDY.max_new_tokens
    logits = jax.jit(vlm.logits)
    for _ in answer[:4]:
        batch = pad_prompts([prompt], 1, vlm.tile)
        token = int(logits(params, batch)[0, len(prompt.tokens_T) - 1].argmax())
        assert token == answer[0]
        answer = answer[1:]
        prompt = dataclasses.replace(
            prompt,
            tokens_T=np.append(prompt.tokens_T, np.int32(token)),
            positions_T=np.append(prompt.positions_T, prompt.positions_T[-1] + 1),
            visual_index_T=np.append(prompt.visual_index_T, np.int32(-1)),
            labels_T=np.append(prompt.labels_T, np.int32(-100)),
        )


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_equals_that_row_alone(generator, prompts, sampling):
    together = [[] for _ in prompts]
    for tokens in generator.start(prompts, sampling.max_new_tokens).stream(sampling):
        for answer, token in zip(together, tokens, strict=True):
            answer.append(int(token))
    for row, prompt in enumerate(prompts):
        alone = generator.start([prompt], sampling.max_new_tokens)
        own = dataclasses.replace(sampling, seed=sampling.seed + row)
        assert [int(token) for [token] in alone.stream(own)] == [token for token in together[row] if token != FINISHED]


def test_generate_keeps_the_order_of_the_prompts(generator, prompts, make_prompt):
    """In batches of like size, the last of which is not full."""
    mixed = [make_prompt(20, 2, seed=3), *prompts, make_prompt(11, 2, seed=4)]
    answers = generator.generate(mixed, GREEDY, batch_size=len(prompts))
    for prompt, answer in zip(mixed, answers, strict=True):
        assert generator.generate([prompt], GREEDY) == [answer]


def test_scores_are_those_of_the_row_alone(vlm, params, generator, prompts):
    together = generator.start(prompts, 4).logits_BV
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(generator.start([prompt], 4).logits_BV[0], together[row], atol=1e-5)


def text(ids):
    """Tokens that go on from where a session stands."""
    empty, T = np.zeros(0, np.int32), len(ids)
    tiles = np.zeros((0, 28, 28, 3), np.uint8)
    return Sample(
        np.array(ids, np.int32),
        np.zeros(T, np.int32),
        np.arange(T, dtype=np.int32),
        np.full(T, -1, np.int32),
        tiles,
        empty,
    )


def test_appending_at_once_equals_token_by_token(generator, make_prompt):
    prompt, ids = make_prompt(9, 2), [7, 8, 9, 10, 11]
    at_once, one_by_one = generator.start([prompt], 8), generator.start([prompt], 8)
    at_once.append(text(ids))
    for token in ids:
        one_by_one.append(text([token]))
    np.testing.assert_allclose(at_once.logits_BV, one_by_one.logits_BV, atol=1e-5)
    np.testing.assert_array_equal(at_once.state.position_B, one_by_one.state.position_B)


def test_stop_ids_end_a_row_and_are_not_returned(vlm, params, make_prompt):
    prompt = make_prompt(9, 1)
    [free] = Generator(vlm, params, stop_ids=[]).generate([prompt], GREEDY)
    stop = free[4]
    [stopped] = Generator(vlm, params, stop_ids=[stop]).generate([prompt], GREEDY)
    assert stopped == free[: free.index(stop)]


def test_any_stop_id_ends_its_row_alone(vlm, params, prompts):
    """Nothing comes after it, and it is not read; other rows go on."""

    def draw(*stop_ids):
        session = Generator(vlm, params, stop_ids=stop_ids).start(prompts, SAMPLED.max_new_tokens)
        return np.stack([tokens for tokens, _ in session.draw(SAMPLED)], axis=1), session

    free = draw()[0].tolist()
    drawn, session = draw(free[0][2], free[1][4])
    lengths = []
    for row, (prompt, answer) in enumerate(zip(prompts, free, strict=True)):
        end = next((n + 1 for n, token in enumerate(answer) if token in session.generator.stop_ids), None)
        assert drawn[row][drawn[row] != FINISHED].tolist() == answer[:end]
        lengths.append(len(answer[:end]))
        assert session.state.length_B[row] == len(prompt.tokens_T) + lengths[row] - (end is not None)
    assert lengths[:2] == [3, 5] and lengths[2] > 5


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_banned_ids_are_never_chosen(vlm, params, make_prompt, sampling):
    prompt = make_prompt(9, 1)
    [free] = Generator(vlm, params, stop_ids=[]).generate([prompt], sampling)
    [banned] = Generator(vlm, params, stop_ids=[], banned_ids=free).generate([prompt], sampling)
    assert len(banned) == len(free) and not set(banned) & set(free)


def test_the_same_seed_gives_the_same_answer(generator, make_prompt):
    prompt = make_prompt(9, 1)
    first, again = (generator.generate([prompt], SAMPLED) for _ in range(2))
    assert first == again != generator.generate([prompt], dataclasses.replace(SAMPLED, seed=4))


def test_no_room_is_an_error_with_the_knob(generator, make_prompt):
    session = generator.start([make_prompt(64, 0)], 8)
    with pytest.raises(ValueError, match="room for .* new_tokens"):
        next(session.stream(SamplingConfig(max_new_tokens=1000)))
    with pytest.raises(ValueError, match="room for"):
        session.append(text(range(1000)))
    with pytest.raises(ValueError, match="must hold the prompts of 64 token slots, got a capacity of 63"):
        generator.programs.prefill(generator.params, pad_prompts([make_prompt(64, 0)], 1, generator.vlm.tile), 63)


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)])
def test_eight_devices_give_the_scores_and_tokens_of_one(vlm, params, generator, make_prompt, sizes):
    prompts = [make_prompt(9 + n, 1 + n % 2, seed=n) for n in range(8)]
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
    many = Generator(vlm, sharded, stop_ids=[1], mesh=mesh)
    np.testing.assert_allclose(many.start(prompts, 4).logits_BV, generator.start(prompts, 4).logits_BV, atol=1e-5)
    assert many.generate(prompts, GREEDY) == generator.generate(prompts, GREEDY)


def test_each_program_is_compiled_with_the_options_of_its_device(vlm, params, generator, prompts, monkeypatch):
    session = generator.start(prompts, GREEDY.max_new_tokens)
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_no_such_option": True})
    compiled.cache_clear()
    session.generator = Generator(vlm, params, stop_ids=[1])
    compiled.cache_clear()
    programs = {
        "prefill": lambda: session.generator.start(prompts, GREEDY.max_new_tokens),
        "extend": lambda: session.append(text([5])),
        "step": lambda: next(session.stream(GREEDY)),
    }
    for run in programs.values():
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            run()


def test_nothing_compiles_after_warm_up(generator, make_prompt):
    generator.generate([make_prompt(10, 1)], GREEDY)
    before = [function._cache_size() for function in compiled(generator.vlm, None)]
    for length in range(20, 30):
        generator.generate([make_prompt(length, 1, seed=length)], GREEDY)
    assert [function._cache_size() for function in compiled(generator.vlm, None)] == before


def test_a_step_does_not_copy_the_cache(vlm, params, generator, make_prompt):
    session = generator.start([make_prompt(9, 1)] * 2, 3000)  # large, so that the cache outweighs the parameters
    extend = jax.jit(functools.partial(extended, vlm), donate_argnums=1)
    one = jnp.ones((2, 1), jnp.int32)
    compiled = extend.lower(params, session.state, one, jnp.ones(2, jnp.int32)).compile()
    shape = ",".join(map(str, session.state.cache.k_LBKSC.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())
    cache_bytes = 2 * session.state.cache.k_LBKSC.nbytes
    assert compiled.memory_analysis().alias_size_in_bytes >= cache_bytes
    # one layer's keys and values are read at a time
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * cache_bytes


def test_without_images_the_program_is_that_of_a_plain_model(vlm, params, make_prompt):
    plain = VLM(dataclasses.replace(vlm.config, memory=None))
    batch = jax.tree.map(jnp.asarray, pad_prompts([make_prompt(9, 0)], 1, vlm.tile))
    without_memory = {name: part for name, part in params.items() if name != "memory"}

    def program(vlm, params):
        compiled = jax.jit(vlm.hidden).lower(params, batch).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert program(vlm, params) == program(plain, without_memory)
    np.testing.assert_array_equal(jax.jit(vlm.logits)(params, batch), jax.jit(plain.logits)(without_memory, batch))
