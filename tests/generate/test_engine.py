"""A pool of rows: what a request gets depends on it alone, and nothing compiles once the pool is warm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.verbs import written
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.generate.engine import Engine
from vlmem_jax.generate.prompts import filled
from vlmem_jax.generate.requests import Request
from vlmem_jax.generate.rows import settings
from vlmem_jax.generate.sampling import LIMITED, choose
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings

SHAPE = PoolShape(slots=3, capacity=96, chunk=32, tiles=2, forced=4)
GREEDY = SamplingConfig(max_new_tokens=8)
SAMPLED = SamplingConfig(max_new_tokens=6, temperature=1.0, top_k=40, top_p=0.9, seed=3)
DRAWN = SamplingConfig(max_new_tokens=9, temperature=0.8, seed=5)


@pytest.fixture(scope="module")
def generator(vlm, params):
    return Generator(vlm, params, stop_ids=[1])


@pytest.fixture(scope="module")
def engine(generator):
    engine = Engine(generator, SHAPE)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def requests(make_prompt):
    """Prompts that take one chunk or three, with and without tiles, each with settings of its own."""
    prompts = [make_prompt(9, 1, 0), make_prompt(62, 2, 1), make_prompt(14, 2, 2), make_prompt(5, 0, 3)]
    return [Request(prompt, how) for prompt in prompts for how in (GREEDY, SAMPLED, DRAWN)]


@pytest.fixture(scope="module")
def by_itself(engine, requests):
    """What became of each request with nothing beside it."""
    handles = []
    for request in requests:
        handles.append(engine.submit(request))
        engine.run()
    return handles


@pytest.fixture(scope="module")
def alone(by_itself):
    """The answers."""
    return [handle.result() for handle in by_itself]


@pytest.fixture(scope="module")
def scores(vlm, params):
    """Scores [T, V] of whole samples, read at once without a cache; all through one program."""
    logits = jax.jit(vlm.logits)
    return lambda samples: logits(params, filled(samples, 12, vlm.tile, 128, 2))


def test_answers_are_those_of_reading_everything_again_for_each_token(vlm, requests, by_itself, scores):
    """Greedy and drawn, after prompts that were read in a piece and in chunks, with their log-probabilities."""
    found = scores([written(handle.request.sample, handle.answer) for handle in by_itself])
    for row, (request, handle) in enumerate(zip(requests, by_itself, strict=True)):
        begun, count = len(request.sample.tokens_T), len(handle.tokens)
        choice, _, _ = settings(vlm, SHAPE, request.sampling)
        alike = jax.tree.map(lambda x, count=count: jnp.repeat(x, count, axis=0), choice)
        drawn = choose(found[row, begun - 1 : begun - 1 + count], alike, begun + jnp.arange(count), LIMITED)
        assert drawn[0].tolist() == handle.tokens
        np.testing.assert_allclose(handle.logp, drawn[1], atol=1e-5)


def test_an_answer_depends_on_its_request_alone(engine, requests, by_itself, alone):
    """Neither on neighbours, nor on when it came, nor on its slot; some leave early, one is moved in between."""
    order = np.random.default_rng(0).permutation(len(requests))
    with compilations() as compiled:
        handles = {n: engine.submit(requests[n]) for n in order[:7]}
        left = engine.submit(requests[0])
        for _ in range(4):
            engine.step()
        left.cancel()
        moved = next(handle for handle in handles.values() if handle in engine._owners)
        arrays = engine.take_out(moved)
        handles |= {n: engine.submit(requests[n]) for n in order[7:]}
        engine.put_back(moved, arrays)
        engine.run()
        engine.score([request.sample for request in requests[::3]], [5, 6, 7])
    assert [handles[n].result() for n in range(len(requests))] == alone
    for n, handle in enumerate(by_itself):
        np.testing.assert_array_equal(handles[n].logp, handle.logp)
    assert left.reason == "cancelled" and left.answer == alone[0][: len(left.tokens)]
    assert compiled == [], "nothing, after the pool was warm"


def test_a_row_is_put_back_as_it_was(engine, make_prompt):
    handle = engine.submit(Request(make_prompt(9, 1), DRAWN))
    for _ in range(3):
        engine.step()
    arrays = engine.take_out(handle)
    engine.put_back(handle, arrays)
    engine._fill()
    again = engine.take_out(handle)
    for name, x in arrays.items():
        np.testing.assert_array_equal(again[name], x)
    handle.cancel()


def test_samples_of_one_prompt_are_read_once(engine, make_prompt, monkeypatch):
    prompt, reads = make_prompt(70, 0), []
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda reading: (reads.append(1), read(reading)))
    own = [dataclasses.replace(DRAWN, seed=seed) for seed in range(5)]
    handles = engine.fork([Request(prompt, one) for one in own])
    answers = [handle.result() for handle in handles]
    assert len(reads) == 3, "chunks of 32 tokens"
    monkeypatch.undo()
    each = [engine.submit(Request(prompt, one)) for one in own]
    assert answers == [handle.result() for handle in each]
    for once, again in zip(handles, each, strict=True):
        np.testing.assert_allclose(once.logp, again.logp, atol=1e-5)
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(fsdp=4, tensor=2)])
def test_devices_that_split_rows_read_a_prompt_each(vlm, params, requests, by_itself, sizes, monkeypatch):
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)))
    sharded = jax.device_put(jax.device_get(params), param_shardings(mesh, vlm.abstract(), vlm.axes()))
    engine = Engine(Generator(vlm, sharded, stop_ids=[1], mesh=mesh), SHAPE._replace(slots=8))
    lanes, read = [], engine._read
    monkeypatch.setattr(engine, "_read", lambda reading: (lanes.append(len(reading.lanes)), read(reading)))
    handles = [engine.submit(request) for request in requests]
    assert [handle.result() for handle in handles] == [handle.answer for handle in by_itself]
    for one, many in zip(by_itself, handles, strict=True):
        np.testing.assert_allclose(many.logp, one.logp, atol=1e-5)
    # each prompt three times, at once, the second in three chunks
    assert lanes == [3] + [3, 3, 3] + [3] + [3]


def test_tokens_come_one_by_one(engine, requests, alone):
    came = []
    handle = engine.submit(dataclasses.replace(requests[0], on_token=came.append))
    iterator = iter(handle)
    assert next(iterator) == alone[0][0] and len(came) < len(alone[0])
    assert [alone[0][0], *iterator] == came == alone[0] and handle.reason == "length"


def test_each_row_stops_where_its_own_settings_say(engine, requests, alone):
    stop = alone[0][3]
    handles = [
        engine.submit(requests[0]),
        engine.submit(dataclasses.replace(requests[0], stop_ids=[alone[0][5], stop], keep=True)),
        engine.submit(dataclasses.replace(requests[0], forced=[7, -1, 8])),
    ]
    free, stopped, forced = (handle.result() for handle in handles)
    assert free == alone[0] and stopped == alone[0][: alone[0].index(stop)]
    assert handles[1].reason == "stop" and handles[1].tokens[-1] == stop
    # it is not read
    assert handles[1].row.decode.length_B == handles[1].length == len(requests[0].sample.tokens_T) + len(stopped)
    assert (forced[0], forced[2]) == (7, 8)
    assert np.isnan(handles[2].logp).tolist() == [True, False, True] + [False] * 5


@pytest.mark.parametrize("n", range(3), ids=["greedy", "limited", "drawn"])
def test_banned_ids_are_never_chosen(engine, requests, alone, n):
    banned = engine.submit(dataclasses.replace(requests[n], banned_ids=alone[n])).result()
    assert len(banned) == len(alone[n]) and not set(banned) & set(alone[n])


def test_what_is_appended_to_an_answer_is_read_behind_it(engine, make_prompt, scores):
    first, more = make_prompt(9, 1), make_prompt(6, 0, 4)
    turn = engine.submit(Request(first, GREEDY, keep=True))
    said = turn.result()
    answer = engine.submit(Request(more, GREEDY, after=turn)).result()
    begun = len(first.tokens_T) + len(said) + 6
    logits_TV = scores([written(first, [*said, *more.tokens_T, *answer])])[0]
    assert logits_TV[begun - 1 : begun - 1 + len(answer)].argmax(-1).tolist() == answer
    with pytest.raises(ValueError, match="done and kept, once"):
        engine.submit(Request(more, GREEDY, after=turn))


def test_a_memory_that_all_tokens_read_cannot_see_what_comes_late(engine, make_prompt):
    turn = engine.submit(Request(make_prompt(12, 1), GREEDY, keep=True))
    turn.result()
    with pytest.raises(ValueError, match="images must come before the first token is read"):
        engine.submit(Request(make_prompt(9, 1), GREEDY, after=turn))


def test_what_there_is_no_room_for_is_refused_with_the_knob(engine, make_prompt):
    with pytest.raises(ValueError, match="room for 96 tokens, got 90 of the prompt prompt 0, max_new_tokens 8"):
        engine.submit(Request(make_prompt(90, 0), GREEDY))
    with pytest.raises(ValueError, match="shows 3 tiles, but a row has room for 2"):
        engine.submit(Request(make_prompt(9, 3), GREEDY))
    with pytest.raises(ValueError, match="forced has 5 tokens for a row, but there are places for 4"):
        engine.submit(Request(make_prompt(9, 0), GREEDY, forced=[1] * 5))
    with pytest.raises(ValueError, match="texts can end an answer where the engine has a tokenizer"):
        engine.submit(Request(make_prompt(9, 0), GREEDY, until=["."]))


def test_a_row_that_is_not_finite_fails_alone(vlm, params, make_prompt):
    poisoned = make_prompt(9, 0, 1)
    bad = int(np.setdiff1d(np.arange(5, 100), make_prompt(12, 0, 2).tokens_T)[0])
    poisoned.tokens_T[4] = bad
    broken = params | {"decoder": params["decoder"] | {"embed": params["decoder"]["embed"].at[bad].set(jnp.nan)}}
    engine = Engine(Generator(vlm, broken, stop_ids=[], banned_ids=[bad]), SHAPE)
    good, failed = engine.submit(Request(make_prompt(12, 0, 2), GREEDY)), engine.submit(Request(poisoned, GREEDY))
    assert len(good.result()) == GREEDY.max_new_tokens
    with pytest.raises(RuntimeError, match="the scores of prompt 1 are not finite"):
        failed.result()
    assert len(engine.submit(Request(make_prompt(12, 0, 2), GREEDY)).result()) == GREEDY.max_new_tokens


def test_an_engine_that_fails_fails_all_with_its_words(generator, make_prompt, monkeypatch):
    engine = Engine(generator, SHAPE)
    handles = [engine.submit(Request(make_prompt(9, 0, n), GREEDY)) for n in range(5)]

    def broken(*_):
        raise jax.errors.JaxRuntimeError("out of memory")

    monkeypatch.setattr(engine, "_programs", engine._programs._replace(step=broken))
    for handle in handles:
        with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
            handle.result()
    with pytest.raises(RuntimeError, match="the engine failed: out of memory"):
        engine.submit(Request(make_prompt(9, 0), GREEDY))
