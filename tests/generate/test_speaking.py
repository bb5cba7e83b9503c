"""Rows of a pool that call for memories: formed for several together, without a change for any."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.patches_world import sample
from vlmem_jax.evals.measure import compilations
from vlmem_jax.families import resolve
from vlmem_jax.generate import Generator, InvocationConfig, SamplingConfig, speaking
from vlmem_jax.generate.engine import Engine
from vlmem_jax.generate.requests import Request
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.runtime.shapes import PoolShape

NEW = 7
GREEDY = SamplingConfig(max_new_tokens=NEW)
SAMPLED = SamplingConfig(max_new_tokens=NEW, temperature=1.0, seed=3)
RULE = InvocationConfig("delimiter_random", probability=0.0)
"""Only the caller calls."""
CHANCE = InvocationConfig("delimiter_random", 0.4, 0.1)


@pytest.fixture(scope="module")
def generator():
    vlm = VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": "vismem", "decoder": {"layers": 2}}))
    params, normal = drawn.params(vlm, 1), np.random.default_rng(7).normal
    params["decoder"]["embed"] *= 30
    params["memory"]["special_in"] = jnp.asarray(normal(size=params["memory"]["special_in"].shape), jnp.float32)
    return Generator(vlm, params, stop_ids=[], delimiter_ids=range(0, 160, 2))


@pytest.fixture(scope="module")
def engine(generator):
    return Engine(generator, PoolShape(slots=3, capacity=128, chunk=128, tiles=16, forced=16))


@pytest.fixture(scope="module")
def requests(generator):
    """Two images; text alone; one image: with calls of either kind, at the ends, several, none, and by chance."""
    vlm, short, long = generator.vlm, *generator.vlm.speech.invoke_ids
    grids = [[PatchGrid(1, 3, 4), PatchGrid(1, 2, 2)], [], [PatchGrid(1, 4, 3)]]
    prompts = [sample(vlm, grid, 5 + 2 * n, seed=n) for n, grid in enumerate(grids)]
    forced = [(-1, -1, short), (long, -1, -1, short), (), (-1, long, *(-1,) * (NEW - 3), short)]
    asked = [Request(prompt, SAMPLED, RULE, forced=ids, record=True) for prompt in prompts for ids in forced]
    asked += [Request(prompt, SAMPLED, CHANCE, record=True) for prompt in prompts]
    return [*asked, Request(prompts[0], GREEDY), Request(prompts[1], SAMPLED, InvocationConfig("never"))]


def test_an_answer_depends_on_its_request_alone(engine, requests):
    """Memories are formed in groups while others go on; some rows are moved while they wait."""
    alone = [engine.submit(request) for request in requests]
    for handle in alone:
        handle.result()
    engine.warm_up()
    sizes, form = [], engine._speaking.form
    engine._speaking.form = lambda rows, rows_R, kinds_R, size: (
        sizes.append(len(rows_R)),
        form(rows, rows_R, kinds_R, size),
    )[1]
    order = np.random.default_rng(0).permutation(len(requests))
    always, turned = InvocationConfig("always"), dataclasses.replace(RULE, reverse_types=True)
    with compilations() as compiled:
        others = [engine.submit(dataclasses.replace(requests[1], invocation=how)) for how in (always, turned)]
        handles = {n: engine.submit(requests[n]) for n in order}
        moved, arrays = None, None
        while engine.step():
            waiting = [handle for handle in engine._owners if handle and handle.waits]
            if waiting and moved is None:
                moved = waiting[0]
                arrays = engine.take_out(moved)
            elif arrays is not None and not (engine._queue and engine._queue[0].row):
                engine.put_back(moved, arrays)
                arrays = None
    engine._speaking.form = form
    assert compiled == [] and max(sizes) > 1 and min(sizes) == 1 and moved.reason
    for n, handle in enumerate(alone):
        assert handles[n].tokens == handle.tokens
        np.testing.assert_allclose(handles[n].logp, handle.logp, atol=1e-5)
        assert [m[:3] for m in handles[n].invocations] == [m[:3] for m in handle.invocations]
    assert all(handle.result() for handle in others)
    ids = {token for handle in alone for token in handle.tokens}
    assert ids >= set(engine.vlm.speech.end_ids)


def test_others_go_on_while_a_row_waits(engine, requests):
    caller, other = engine.submit(requests[1]), engine.submit(requests[2])
    while not caller.waits:
        engine.step()
    before = len(other.tokens)
    while caller.waits:
        engine.step()
    assert len(other.tokens) > before and caller.invocations
    assert len(other.result()) == NEW and len(caller.result()) == NEW + 2


def test_a_memory_formed_at_once_two_tokens_before_the_last(engine, requests, monkeypatch):
    """Two rows make up a group, so that their memories are there before the step after the call has been heard."""
    monkeypatch.setattr(speaking, "GROUPS", (1, 2))
    long = engine.vlm.speech.invoke_ids[1]
    last_call = dataclasses.replace(RULE, max_invocations=1)
    forced = (*(-1,) * (NEW - 3), long)
    request = dataclasses.replace(requests[4], invocation=last_call, forced=forced, record=False)
    handles = [engine.submit(request) for _ in range(2)]
    engine.run()
    for handle in handles:
        assert handle.reason == "length" and len(handle.tokens) == NEW + 1 and len(handle.invocations) == 1


def test_each_row_has_rules_of_its_own(engine, requests, generator):
    speech, request = generator.vlm.speech, requests[1]
    configs = [RULE, *(dataclasses.replace(RULE, **how) for how in (
        dict(reverse_types=True), dict(disabled=("long",)), dict(max_invocations=1)))]  # fmt: skip
    handles = [engine.submit(dataclasses.replace(request, invocation=config)) for config in configs]
    engine.run()
    short, long = range(2)
    kinds = [[memory.kind for memory in handle.invocations] for handle in handles]
    assert kinds == [[long, short], [short, long], [short], [long]]
    for handle, found in zip(handles, kinds, strict=True):
        ends = [token for token in handle.tokens if token in speech.end_ids]
        assert ends == [speech.end_ids[kind] for kind in found] and len(handle.tokens) == NEW + len(found)
        assert [handle.tokens[memory.place] for memory in handle.invocations] == ends


def test_memories_that_there_is_no_room_for_are_refused(engine, requests):
    with pytest.raises(ValueError, match="room for 128 tokens, got .* and .* for memories"):
        engine.submit(dataclasses.replace(requests[0], sampling=SamplingConfig(max_new_tokens=100)))
