"""The programs of an engine: what they are compiled with, and what they leave where it is."""

import re

import jax
import jax.numpy as jnp
import pytest

from tests import drawn
from vlmem_jax.families import resolve
from vlmem_jax.generate import Engine, Generator, score
from vlmem_jax.generate.rows import Plan, Programs, compiled
from vlmem_jax.generate.warming import programs
from vlmem_jax.models import VLM
from vlmem_jax.runtime.compiler import OPTIONS
from vlmem_jax.runtime.shapes import PoolShape


def test_each_program_is_compiled_with_the_options_of_its_device(monkeypatch):
    vlm = VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": "vismem", "decoder": {"layers": 1}}))
    generator = Generator(vlm, drawn.params(vlm), stop_ids=[])
    engine = Engine(generator, PoolShape(slots=2, capacity=64, chunk=64, tiles=64))
    monkeypatch.setitem(OPTIONS, "cpu", {"xla_no_such_option": True})
    compiled.cache_clear()
    score.labels_program.cache_clear()
    refused = set()

    def described(name, program):
        """Does not compile; gives the shapes of what it would give."""

        def call(*arguments):
            with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
                program.lower(*arguments).compile()
            refused.add(name)
            return program.eval_shape(*arguments)

        return call

    made = compiled(vlm, None, engine.shape, vlm.tile)
    engine._programs = Programs(*(described(*each) for each in made._asdict().items()))
    engine._programs.empty()
    engine._score._programs = engine._speaking._programs = engine._programs
    each = {name.split()[0]: run for name, run in programs(engine).items()}
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        each.pop("labels")()
    for run in each.values():
        run()
    compiled.cache_clear()
    score.labels_program.cache_clear()
    assert refused == set(Programs._fields)


def test_a_step_does_not_copy_the_cache(vlm):
    made = compiled(vlm, None, PoolShape(slots=2, capacity=3000, chunk=64), vlm.tile)
    rows = jax.eval_shape(made.empty)  # large, so that the cache outweighs the parameters
    delimiter_V, number = (
        jax.ShapeDtypeStruct(of, t) for of, t in (((vlm.config.decoder.vocab,), bool), ((), jnp.int32))
    )
    step = made.step.lower(vlm.abstract(), rows, delimiter_V, Plan(number, number)).compile()
    keys = rows.decode.cache.k_LBKSC
    shape = ",".join(map(str, keys.shape))
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(", step.as_text())
    cache_bytes = 2 * keys.size * keys.dtype.itemsize
    assert step.memory_analysis().alias_size_in_bytes >= cache_bytes
    # one layer's keys and values are read at a time
    assert step.memory_analysis().temp_size_in_bytes < 0.5 * cache_bytes
