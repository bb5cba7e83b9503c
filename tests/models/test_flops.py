import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vlmem_jax import families
from vlmem_jax.models import VLM, flops
from vlmem_jax.types import Batch, Text, Views

ROWS, TOKENS, TILES = 2, 64, 3


def config(memory="comemo"):
    """One layer of each kind: what a loop repeats, XLA counts once."""
    blocks = {"kind": memory, "every": 1} if memory == "comemo" else None
    one = {"decoder": {"layers": 1}, "vision": {"layers": 1}}
    return families.resolve({"preset": "tiny", **one, "memory": blocks})


@pytest.mark.parametrize("memory", ["comemo", "none"])
def test_forward_flops_are_those_that_xla_counts(memory):
    settings = config(memory=memory)
    model = VLM(settings)
    side, slots = settings.vision.image_size, TILES * model.tokens_per_tile
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    row = ints(ROWS, TOKENS)
    views = Views(jax.ShapeDtypeStruct((ROWS, TILES, side, side, 3), jnp.uint8), ints(ROWS, slots), ints(ROWS, slots))
    batch = Batch(Text(row, row, row, row), views)
    counted = jax.jit(model.logits).lower(model.abstract(), batch).compile().cost_analysis()["flops"]
    causal = settings.decoder.flops(TOKENS)[1]  # XLA computes the half of the pairs that is not used, too
    assert 1.0 < counted / (flops.train_flops(settings, [(TOKENS, TILES)] * ROWS, ()) + ROWS * causal) < 1.15


@pytest.mark.parametrize("former", ["lora_llm", "tiny_transformer"])
def test_flops_of_forming_memories_are_those_that_xla_counts(former):
    one = {"decoder": {"layers": 1}, "vision": {"layers": 1, "full_layers": (0,)}}
    encoders = {"query_builder": {"layers": 1}, "tiny": {"layers": 1, "ff_mult": 1}}
    own = {"kind": "vismem", "former": former, "max_visual_hidden": 0, "lora": {"rank": 1}, **encoders}
    settings = families.resolve({"preset": "tiny_qwen2_5_vl", "memory": own, **one})
    model, states = VLM(settings), settings.memory.max_prompt_hidden
    params = model.abstract()
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Batch.empty((ROWS,), TOKENS, 0, model.tile)))
    _, state = jax.eval_shape(lambda params, batch: model.prefill(params, batch, 2 * TOKENS), params, batch)
    rows_R = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    program = jax.jit(model.form, static_argnums=4).lower(params, state, rows_R, rows_R, states)
    counted = program.compile().cost_analysis()["flops"]
    T = states + settings.memory.query_len + max(settings.memory.lengths)
    causal = settings.decoder.flops(T)[1] if former == "lora_llm" else 0
    forward = flops.formation_flops(settings, states, ())
    assert 1.0 < counted / (ROWS * (forward + causal)) < 1.15
    assert flops.formation_flops(settings, states, ["memory/special_in", "decoder/embed"]) == forward
    assert 1.9 * forward < flops.formation_flops(settings, states, ["memory/short/m_init"]) <= 3 * forward


def test_a_backward_pass_costs_what_is_trained():
    settings = config()
    paths = ["vision/layers/k", "projector/k", "memory/blocks/k", "decoder/layers/k", "decoder/head/kernel"]

    def cost(*trained):
        return flops.train_flops(settings, [(TOKENS, TILES)], trained)

    forward = cost()
    assert cost(*paths) == 3 * forward
    assert forward < cost("decoder/head/kernel") < 1.5 * forward
    tower = TILES * sum(settings.vision.flops)
    assert cost("projector/k") < 3 * (forward - tower) + tower, "nothing goes back through a frozen tower"
    assert cost("projector/k", "memory/blocks/k") < cost("projector/k", "memory/blocks/k", "decoder/layers/k")


def test_flops_grow_with_what_they_are_for():
    settings = config()
    wide = dataclasses.replace(settings, decoder=dataclasses.replace(settings.decoder, layers=2))
    assert wide.decoder.flops(8)[0] == 2 * settings.decoder.flops(8)[0]


SAMPLES = (64, 3), (16, 0), (1, 1), (200, 7)


@pytest.mark.parametrize("trained", [(), ("memory/blocks/k", "decoder/layers/k")])
@pytest.mark.parametrize("preset", families.PRESETS)
def test_a_pack_costs_what_its_samples_cost_alone(preset, trained):
    settings = families.resolve({"preset": preset})
    alone = [flops.train_flops(settings, [sample], trained) for sample in SAMPLES]
    assert flops.train_flops(settings, SAMPLES, trained) == sum(alone) > 0 == flops.train_flops(settings, (), trained)
    whole = flops.train_flops(settings, [tuple(map(sum, zip(*SAMPLES, strict=True)))], trained)
    assert sum(alone) < whole, "pairs of different samples"


def test_sizes_of_a_large_model_are_counted_exactly():
    settings = families.resolve({"preset": "comemo_9b"})
    one = flops.train_flops(settings, [(16384, 48)], ("decoder/layers/k",))
    assert flops.train_flops(settings, [(16384, 48)] * 10_000, ("decoder/layers/k",)) == 10_000 * one > 2**63


def test_text_alone_does_not_pass_the_memory():
    with_memory, without = (config(memory=memory) for memory in ("comemo", "none"))
    assert flops.train_flops(with_memory, [(64, 0)], ()) == flops.train_flops(without, [(64, 0)], ())
    assert flops.decode_flops(with_memory, 2, 64, 0) == flops.decode_flops(without, 2, 64, 0)


def test_decisions_cost_what_their_prompts_cost_alone():
    """But for what was seen before."""
    settings = families.resolve({"preset": "tiny_qwen3_vl"})
    alone = flops.prefill_flops(settings, 1, 32, 8)
    assert flops.decide_flops(settings, 3, 64, 16, samples=2) == 6 * alone
    assert flops.decide_flops(settings, 1, 32, 8, is_seen=True) == flops.prefill_flops(settings, 1, 32, 0)
