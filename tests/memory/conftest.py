"""A small VisMem, its prompts and its answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from tests.memory import vismem_world as world
from tests.patches_world import sample
from vlmem_jax.families import resolve
from vlmem_jax.generate import Generator
from vlmem_jax.generate.loop import FINISHED
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
    """Ids and log-probabilities of each prompt's answer, FINISHED left out, and the session; in batches of ROWS."""

    def run(prompts, sampling=world.GREEDY, config=world.RULE, forced=(), keys=None, generator=generator, record=False):
        session = generator.start(prompts, world.NEW, world.ROWS)
        keys_B = None if keys is None else jax.vmap(jax.random.key)(jnp.resize(jnp.array(keys), world.ROWS))
        drawn = list(session.draw(sampling, keys_B, config, forced, record))
        tokens, logp = (np.stack(part, axis=1) for part in zip(*drawn, strict=True))
        has = tokens != FINISHED
        return [t[h].tolist() for t, h in zip(tokens, has, strict=True)], [
            x[h] for x, h in zip(logp, has, strict=True)
        ], session  # fmt: skip

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
