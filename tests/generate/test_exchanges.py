"""What devices exchange while they decode: with rows split nothing, with heads split sums, with weights split these."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmem_jax.families import resolve
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.generate import Generator
from vlmem_jax.generate.rows import Plan, compiled, prompt_text
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import serving_mesh
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import (
    MeshConfig,
    batch_sharding,
    batch_shards,
    even_spec,
    lay_out,
    make_mesh,
    param_shardings,
)
from vlmem_jax.trees import flatten
from vlmem_jax.types import Batch

TINY = {"decoder": {"layers": 2}, "vision": {"layers": 1}}
MODELS = {
    "plain": VLM(resolve({"preset": "tiny", "memory": None, **TINY})),
    "comemo": VLM(resolve({"preset": "tiny", **TINY})),
    "vismem": VLM(resolve({"preset": "tiny_qwen2_5_vl", "memory": "vismem", **TINY, "vision": {"layers": 2}})),
    "deep": VLM(resolve({"preset": "tiny_qwen3_vl", "memory": "vismem", **TINY, "vision": {"layers": 3}})),
}
ROWS, CAPACITY = 16, 64
"""The batch has two rows for each of eight devices; CAPACITY is the room of each."""


class Exchanges:
    """The programs of an engine of a model, whose parameters are not there, on a mesh of eight devices."""

    def __init__(self, name: str, **sizes: int):
        vlm = MODELS[name]
        self.mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
        places = param_shardings(self.mesh, vlm.abstract(), vlm.axes())
        params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), vlm.abstract(), places)
        self.generator = Generator(vlm, params, stop_ids=[1], mesh=self.mesh)
        self.shape = PoolShape(ROWS, CAPACITY, 16, tiles=16 if vlm.tile.layout else 2)
        self.programs = compiled(vlm, self.mesh, self.shape, vlm.tile)

    def reading(self) -> list:
        """The exchanges of reading prompts side by side, one on each device."""
        lanes, programs = batch_shards(self.mesh), self.programs
        empty = Batch.empty((lanes,), 16, self.shape.tiles, self.generator.tile)
        given = empty.views, prompt_text(empty.text), np.zeros(lanes, np.int32)
        places = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self.mesh)), given
        )

        def read(params, views, text, length_B):
            return programs.first.__wrapped__(params, text, programs.see.__wrapped__(params, views), length_B)

        with self.generator.context():
            return self._exchanges(jax.jit(read).lower(self.generator.params, *places))

    def step(self) -> list:
        """The exchanges of a token of all rows."""
        generator, everywhere = self.generator, NamedSharding(self.mesh, PartitionSpec())
        vocab = generator.vlm.config.decoder.vocab

        def place(x, *axes):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, even_spec(x.shape, *axes)))

        def whole(dtype, *sizes):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

        with generator.context():
            rows = lay_out(jax.eval_shape(self.programs.empty), place)
            plan = Plan(whole(jnp.int32), whole(jnp.int32))
            return self._exchanges(self.programs.step.lower(generator.params, rows, whole(bool, vocab), plan))

    def _exchanges(self, lowered: jax.stages.Lowered) -> list:
        fast = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        return HloProgram(lowered.compile(compiler_options=fast).as_text()).collectives(dict(self.mesh.shape))


def is_read(exchange) -> bool:
    """Tokens and their log-probabilities, which every host reads."""
    return exchange.kind == "all-gather" and math.prod(exchange.shape) == ROWS


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_decoded_each_where_it_lies(name):
    found = Exchanges(name, data=8).step()
    assert [c for c in found if not is_read(c)] == [] and sum(c.times for c in found) == 2


@pytest.mark.parametrize("name", ["comemo", "vismem"])
def test_heads_apart_are_summed_twice_a_layer(name):
    programs = Exchanges(name, data=4, tensor=2)
    assert programs.mesh == make_mesh(serving_mesh(MODELS[name], jax.devices())), "what answering takes by default"
    c = programs.generator.vlm.config
    found = [x for x in programs.step() if not (is_read(x) and x.axes == ("data",))]
    assert {x.axes for x in found} == {("tensor",)}
    whole = [x for x in found if x.kind == "all-reduce" and math.prod(x.shape) == ROWS // 4 * c.decoder.width]
    layers = c.decoder.layers + (c.decoder.layers // c.memory.every if c.memory_kind == "comemo" else 0)
    # a draw, where one is needed, is from the scores of the whole vocabulary
    assert all(math.prod(x.shape) <= ROWS // 4 * c.decoder.vocab for x in found if x not in whole)
    assert sum(x.times for x in whole) == 2 * layers + 1, "after attention and MLP, and of the token's row"


@pytest.mark.parametrize("name", ["comemo", "vismem"])
def test_weights_apart_are_all_that_is_gathered(name):
    programs = Exchanges(name, fsdp=8)
    found = programs.step()
    assert {x.kind for x in found} == {"all-gather"} and {x.axes for x in found} == {("fsdp",)}
    shapes, places = (flatten(tree) for tree in (programs.generator.vlm.abstract(), programs.generator.params))
    split = [path for path, x in places.items() if "fsdp" in x.sharding.spec]
    weights = {math.prod(shapes[path].shape[n:]) for path in split for n in (0, 1)}
    assert {math.prod(x.shape) for x in found if not is_read(x)} <= weights


@pytest.mark.parametrize("name", ["vismem", "deep"])
def test_prompts_are_read_each_where_it_lies(name):
    assert Exchanges(name, data=8).reading() == []
