import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vlmem_jax.models import VLM, flops, presets
from vlmem_jax.types import Batch

ROWS, TOKENS, TILES = 2, 64, 3


def config(**changes):
    """One layer of each kind: what a loop repeats, XLA counts once."""
    one = {"decoder": {"layers": 1}, "vision": {"layers": 1}, "comemo": {"every": 1}}
    return presets.resolve({"preset": "tiny", **one, **changes})


@pytest.mark.parametrize("memory", ["comemo", "none"])
def test_forward_flops_are_those_that_xla_counts(memory):
    settings = config(memory=memory)
    model = VLM(settings)
    side, slots = settings.vision.image_size, TILES * model.tokens_per_tile
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    row = ints(ROWS, TOKENS)
    batch = Batch(
        *(row, row, jax.ShapeDtypeStruct(row.shape, jnp.float32), row, row, row),
        jax.ShapeDtypeStruct((ROWS, TILES, side, side, 3), jnp.uint8),
        *(ints(ROWS, slots), ints(ROWS, slots)),
    )
    counted = jax.jit(model.logits).lower(model.abstract(), batch).compile().cost_analysis()["flops"]
    causal = flops.decoder_flops(settings, TOKENS)[1]  # XLA computes the half of the pairs that is not used, too
    assert 1.0 < counted / (flops.train_flops(settings, ROWS, TOKENS, TILES, ()) + ROWS * causal) < 1.15


def test_a_backward_pass_costs_what_is_trained():
    settings = config()
    paths = ["vision/layers/k", "projector/k", "memory/blocks/k", "decoder/layers/k", "decoder/head/kernel"]

    def cost(*trained):
        return flops.train_flops(settings, 1, TOKENS, TILES, trained)

    forward = cost()
    assert cost(*paths) == 3 * forward
    assert forward < cost("decoder/head/kernel") < 1.5 * forward
    tower = TILES * sum(flops.vision_flops(settings))
    assert cost("projector/k") < 3 * (forward - tower) + tower, "nothing goes back through a frozen tower"
    assert cost("projector/k", "memory/blocks/k") < cost("projector/k", "memory/blocks/k", "decoder/layers/k")


def test_flops_grow_with_what_they_are_for():
    settings = config()
    wide = dataclasses.replace(settings, decoder=dataclasses.replace(settings.decoder, layers=2))
    assert flops.decoder_flops(wide, 8)[0] == 2 * flops.decoder_flops(settings, 8)[0]
    assert flops.train_flops(settings, 4, 8, 2, ()) == 4 * flops.train_flops(settings, 1, 8, 2, ())
