"""What devices exchange while they decode: with rows split nothing, with heads split sums, with weights split these."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmem_jax.families import resolve
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.generate import Generator, SamplingConfig
from vlmem_jax.generate.loop import Session, laid_out
from vlmem_jax.generate.rows import Plan, compiled
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import serving_mesh
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import MeshConfig, batch_sharding, even_spec, lay_out, make_mesh, param_shardings
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


class Caught(Exception):
    """The step that was caught is not to run."""


class Programs:
    """The programs of a model, whose parameters are not there, on a mesh of eight devices."""

    def __init__(self, name: str, **sizes: int):
        vlm = MODELS[name]
        self.mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
        places = param_shardings(self.mesh, vlm.abstract(), vlm.axes())
        params = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), vlm.abstract(), places)
        self.generator = Generator(vlm, params, stop_ids=[1], mesh=self.mesh)

    def prefill(self) -> list:
        """The exchanges of reading prompts."""
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self.mesh)),
            prompts(self.generator.vlm),
        )
        with self.generator.context():
            return self._exchanges(self.generator.programs.prefill.lower(self.generator.params, batch, CAPACITY))

    def step(self) -> list:
        """The exchanges of a token, in a session with all that it carries."""
        vlm = self.generator.vlm
        with self.generator.context():
            logits_BV, state = jax.jit(
                lambda: laid_out(*jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), after_prompts(vlm)))
            )()
        programs, lowered = self.generator.programs, []

        def catch(*arguments):
            lowered.append(programs.step.lower(*arguments))
            raise Caught

        self.generator.programs = programs._replace(step=catch)
        with pytest.raises(Caught):
            next(Session(self.generator, state, logits_BV, ROWS, 0, CAPACITY).draw(SamplingConfig(max_new_tokens=4)))
        return self._exchanges(lowered[0])

    def engine_step(self) -> list:
        """The exchanges of a token of an engine's rows."""
        generator, everywhere = self.generator, NamedSharding(self.mesh, PartitionSpec())
        vocab = generator.vlm.config.decoder.vocab
        shape = PoolShape(ROWS, CAPACITY, 16, tiles=16 if generator.tile.layout else 2)
        programs = compiled(generator.vlm, self.mesh, shape, generator.tile)

        def place(x, *axes):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, even_spec(x.shape, *axes)))

        def whole(dtype, *sizes):
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=everywhere)

        with generator.context():
            rows = lay_out(jax.eval_shape(programs.empty), place)
            plan = Plan(whole(jnp.int32), whole(jnp.int32))
            return self._exchanges(programs.step.lower(generator.params, rows, whole(bool, vocab), plan))

    def _exchanges(self, lowered: jax.stages.Lowered) -> list:
        fast = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
        return HloProgram(lowered.compile(compiler_options=fast).as_text()).collectives(dict(self.mesh.shape))


def prompts(vlm: VLM) -> Batch:
    return Batch.empty((ROWS,), 16, 16 if vlm.tile.layout else 2, vlm.tile)


@functools.cache
def after_prompts(vlm: VLM):
    """Shapes of scores and state."""
    return jax.eval_shape(lambda params, batch: vlm.prefill(params, batch, CAPACITY), vlm.abstract(), prompts(vlm))


def is_read(exchange) -> bool:
    """Tokens and their log-probabilities, which every host reads."""
    return exchange.kind == "all-gather" and math.prod(exchange.shape) == ROWS


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["step", "engine_step"])
def test_rows_are_decoded_each_where_it_lies(name, how):
    found = getattr(Programs(name, data=8), how)()
    assert [c for c in found if not is_read(c)] == [] and sum(c.times for c in found) == 2


@pytest.mark.parametrize("how", ["step", "engine_step"])
@pytest.mark.parametrize("name", ["comemo", "vismem"])
def test_heads_apart_are_summed_twice_a_layer(name, how):
    programs = Programs(name, data=4, tensor=2)
    assert programs.mesh == make_mesh(serving_mesh(MODELS[name], jax.devices())), "what answering takes by default"
    c = programs.generator.vlm.config
    found = [x for x in getattr(programs, how)() if not (is_read(x) and x.axes == ("data",))]
    assert {x.axes for x in found} == {("tensor",)}
    whole = [x for x in found if x.kind == "all-reduce" and math.prod(x.shape) == ROWS // 4 * c.decoder.width]
    layers = c.decoder.layers + (c.decoder.layers // c.memory.every if c.memory_kind == "comemo" else 0)
    # a draw, where one is needed, is from the scores of the whole vocabulary
    assert all(math.prod(x.shape) <= ROWS // 4 * c.decoder.vocab for x in found if x not in whole)
    assert sum(x.times for x in whole) == 2 * layers + 1, "after attention and MLP, and of the token's row"


@pytest.mark.parametrize("how", ["step", "engine_step"])
@pytest.mark.parametrize("name", ["comemo", "vismem"])
def test_weights_apart_are_all_that_is_gathered(name, how):
    programs = Programs(name, fsdp=8)
    found = getattr(programs, how)()
    assert {x.kind for x in found} == {"all-gather"} and {x.axes for x in found} == {("fsdp",)}
    shapes, places = (flatten(tree) for tree in (programs.generator.vlm.abstract(), programs.generator.params))
    split = [path for path, x in places.items() if "fsdp" in x.sharding.spec]
    weights = {math.prod(shapes[path].shape[n:]) for path in split for n in (0, 1)}
    assert {math.prod(x.shape) for x in found if not is_read(x)} <= weights


@pytest.mark.parametrize("name", ["vismem", "deep"])
def test_prompts_are_read_each_where_it_lies(name):
    assert Programs(name, data=8).prefill() == []
