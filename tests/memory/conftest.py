"""A small VisMem, its prompts and its answers."""

import dataclasses

import jax
import numpy as np
import pytest

from tests import drawn
from tests.memory import vismem_world as world
from tests.patches_world import sample
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, Request
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid


@pytest.fixture(scope="module")
def vlm():
    return VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": "vismem"}))


@pytest.fixture(scope="module")
def speech(vlm):
    return vlm.speech


@pytest.fixture(scope="module")
def params(vlm):
    """Adapters, which start without effect, have one; embeddings and latent tokens are of one size."""
    params = drawn.params(vlm, 1)
    params["decoder"]["embed"] *= 30
    memory = params["memory"]
    for n, kind in enumerate(("short", "long")):
        for m, adapter in enumerate(memory[kind]["lora"].values()):
            adapter["b"] = world.normal(10 * n + m, adapter["b"].shape)
    memory["special_in"] = world.normal(7, memory["special_in"].shape)
    return params


@pytest.fixture(scope="module")
def generator(vlm, params):
    return Generator(vlm, params, stop_ids=[], delimiter_ids=range(0, 160, 2))


@pytest.fixture(scope="module")
def prompts(vlm):
    """Two images; text alone; one image; a video."""
    grids = [[PatchGrid(1, 3, 4), PatchGrid(1, 2, 2)], [], [PatchGrid(1, 4, 3)], [PatchGrid(2, 2, 3, 0.5)]]
    return [sample(vlm, grid, 5 + 2 * n, seed=n) for n, grid in enumerate(grids)]


@pytest.fixture(scope="module")
def answers(generator):
    """What became of each prompt, ROWS side by side, row n with the seed after that of row n - 1 or the key of
    `keys[n]`; one engine for each generator."""
    engines = {}

    def run(prompts, sampling=world.GREEDY, config=world.RULE, forced=(), keys=None, generator=generator, record=False):
        if generator not in engines:
            engines[generator] = Engine(generator, world.SHAPE)
        engine, requests = engines[generator], []
        for n, prompt in enumerate(prompts):
            own = dataclasses.replace(sampling, seed=sampling.seed + n)
            key_2 = None if keys is None else np.asarray(jax.random.key_data(jax.random.key(keys[n])))
            given = forced[n] if forced else ()
            requests.append(Request(prompt, own, config, key_2, given, keep=True, record=record))
        handles = [engine.submit(request) for request in requests]
        engine.run()
        assert all(handle.reason == "length" for handle in handles)
        return handles

    return run


@pytest.fixture(scope="module")
def forced(speech):
    """Short; long, then short; nothing; both kinds at the ends."""
    return [
        world.calls(speech, (2, 0)),
        world.calls(speech, (0, 1), (3, 0)),
        [],
        world.calls(speech, (2, 1), (world.NEW - 1, 0)),
    ]


@pytest.fixture(scope="module")
def plain(vlm, params):
    """The same model without the memory."""
    without = VLM(dataclasses.replace(vlm.config, memory=None))
    return without, {name: part for name, part in params.items() if name != "memory"}
