"""The programs of training and serving, compiled for devices that need not be there."""

import dataclasses
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.memory import Buffer, buffers, temporary_bytes
from vlmem_jax.flight.program import HloProgram
from vlmem_jax.generate.features import unkept
from vlmem_jax.generate.rows import Plan, Programs, compiled, prompt_text
from vlmem_jax.generate.sampling import GREEDY
from vlmem_jax.generate.score import ENDS, LABELS, labels_program
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPOLoss
from vlmem_jax.rl.config import rl_config
from vlmem_jax.rl.rows import Rows, memory_sizes, row_sizes
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import PoolShape, bucket
from vlmem_jax.runtime.sharding import (
    batch_sharding,
    batch_shards,
    constrain,
    even_spec,
    lay_out,
    param_shardings,
    shards,
)
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import Program
from vlmem_jax.train.next_token import NextTokenLoss
from vlmem_jax.types import Batch, FormationInputs, Text, TileShape

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Keeps libtpu from asking a cloud host what it runs on, and from waiting for others: no chip is needed to compile."""

LAST_WRITTEN = "after_buffer_assignment.txt"
"""End of the name of the file that describes a program whose memory is laid out; machine code comes after it."""

POLL_SECONDS = 0.05

TEXT_BUCKET = 64
"""Smallest number of tokens of a question with what it is about."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A program traced for a mesh, and what its arguments hold on each chip, in bytes."""

    lowered: jax.stages.Lowered
    parameters: int
    state: int
    """Of the optimizer, or of caches that decoding carries."""
    inputs: int
    carried: tuple[jax.ShapeDtypeStruct, ...] = ()
    """The arrays of `state` where it is carried from call to call: none of the large ones is to be copied."""


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler made of a job, whether it fits the chip or not. Bytes of one chip."""

    program: HloProgram
    fits: bool
    temporary: int
    peak: int
    buffers: list[Buffer]
    """What the temporary memory holds, largest first."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """Shapes of prefill and decoding: prompts of `tokens` slots and `tiles` tiles, `new_tokens` after them. Of streams,
    questions of `tokens` slots beside those of what is kept."""

    rows: int
    tokens: int
    tiles: int
    new_tokens: int = 256

    def __post_init__(self):
        if min(self.rows, self.tokens, self.new_tokens) < 1 or self.tiles < 0:
            raise ValueError(f"rows, tokens and new tokens must be at least 1, tiles at least 0; got {self}")


@dataclasses.dataclass(frozen=True)
class Learning:
    """What a step of reinforcement learning learns from: full-length answers to prompts of this size."""

    tokens: int
    """Of a prompt."""
    tiles: int
    memories: int
    """In an answer, where a memory speaks."""

    def __post_init__(self):
        if self.tokens < 1 or min(self.tiles, self.memories) < 0:
            raise ValueError(f"tokens must be at least 1, tiles and memories at least 0; got {self}")

    def sizes(self, experiment: Experiment, stage: StageConfig, mesh: Mesh) -> tuple[int, int, int, int]:
        """T and I of the rows, J and L of their memories. Raises ValueError where prompt and answer fill no row."""
        config, data, model = rl_config(stage), experiment.data_of(stage), experiment.model
        speech = VLM(model).speech
        spoken = self.memories * (speech.latents + 1) if speech else 0
        tokens = self.tokens + config.max_new_tokens + spoken
        if tokens > data.pack_tokens:
            raise ValueError(
                f"data.pack_tokens must hold a prompt and its answer, {self.tokens} + {config.max_new_tokens} tokens"
                f"{f' and {spoken} of memories' if spoken else ''}; got {data.pack_tokens}"
            )
        T, I = row_sizes(tokens, self.tiles, data, shards("tokens", mesh))
        memories, states = self.memories * (T // tokens), config.max_new_tokens
        if speech:
            states = min(states, speech.max_states) + min(self.tiles * model.vision.tile.tokens, self.tokens)
        return T, I, *memory_sizes(memories, states)

    def rows(self, experiment: Experiment, stage: StageConfig, mesh: Mesh) -> Rows:
        """Shapes of a step's rows, with leading axes [parts, rows at once]."""
        config, model = rl_config(stage), VLM(experiment.model)
        T, I, J, L = self.sizes(experiment, stage, mesh)
        at_once = experiment.data_of(stage).rows // experiment.parts(stage, mesh)
        answers = config.prompts * config.group_size // config.minibatches
        shape, sharding = (-(-answers // at_once), at_once), batch_sharding(mesh, leading=1)

        def leaf(*axes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*shape, *axes), dtype, sharding=sharding)

        batch = _batch(experiment.tile, shape, T, I, sharding)
        if model.speech and any(config.invocation.heeded(model.speech)):
            states = leaf(J, L, model.config.decoder.width, dtype=model.dtype)
            batch = batch.replace(formation=FormationInputs(states, leaf(J, dtype=jnp.int32), leaf(J, dtype=jnp.int32)))
        return Rows(batch, leaf(T), leaf(T), leaf(T), leaf())


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The chips of one or more slices, to compile for.

    Needs the package libtpu (extra `tpu`). Raises ValueError for a slice that does not exist.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    alone = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(topology.sizes) == 1 else {}  # a host has four by default
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, num_slices=topology.slices, **alone
        )
    except jax.errors.JaxRuntimeError as error:
        raise topology.missing() from error
    return list(described.devices)


def train_job(experiment: Experiment, stage: StageConfig, mesh: Mesh) -> Job:
    """The very step that `vlmem train` runs in `stage`, without parameters, data or devices."""
    experiment.check_mesh(mesh)
    model = experiment.model_of(stage)
    program = Program(NextTokenLoss(model, experiment.loss_chunk), experiment, stage, mesh)
    _, frozen = program.split.part(program.held)
    with jax.set_mesh(mesh):
        batch = batch_shapes(experiment, stage, mesh)
        denominator = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        lowered = program.step.lower(program.state, frozen, batch, denominator)
    return Job(lowered, held((program.state.params, frozen)), held(program.state.optimizer), held(batch))


def rl_job(experiment: Experiment, stage: StageConfig, learning: Learning, mesh: Mesh) -> Job:
    """The step of a `grpo` stage of `vlmem train` on the rows that a phase's trajectories fill."""
    experiment.check_mesh(mesh)
    model, config = experiment.model_of(stage), rl_config(stage)
    banned_ids = config.invocation.banned_ids(model.speech) if model.speech else ()
    program = Program(GRPOLoss(model, config, experiment.loss_chunk, banned_ids), experiment, stage, mesh)
    _, frozen = program.split.part(program.held)
    with jax.set_mesh(mesh):
        rows = learning.rows(experiment, stage, mesh)
        denominator = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        lowered = program.step.lower(program.state, frozen, rows, denominator)
    return Job(lowered, held((program.state.params, frozen)), held(program.state.optimizer), held(rows))


def prefill_job(experiment: Experiment, serving: Serving, mesh: Mesh) -> Job:
    """Reading prompts side by side, each in a piece, as an engine does: what they show is seen, then all is read."""
    vlm, params, tile = VLM(experiment.model), _serving_params(experiment, mesh), experiment.tile
    programs = _engine(vlm, serving, mesh, tile)

    def read(params, views, text, length_B):
        return programs.first.__wrapped__(params, text, programs.see.__wrapped__(params, views), length_B)

    with jax.set_mesh(mesh):
        batch = _batch(tile, (serving.rows,), serving.tokens, serving.tiles, batch_sharding(mesh))
        length_B = _place(mesh)(jax.ShapeDtypeStruct((serving.rows,), jnp.int32), "batch")
        given = batch.views, prompt_text(batch.text), length_B
        lowered = jax.jit(read, compiler_options=options(mesh)).lower(params, *given)
    return Job(lowered, held(params), 0, held(given))


def decode_job(experiment: Experiment, serving: Serving, mesh: Mesh) -> Job:
    """A greedy token for each row of an engine, all of whose caches are full."""
    vlm, params, tile = VLM(experiment.model), _serving_params(experiment, mesh), experiment.tile
    programs, capacity = _engine(vlm, serving, mesh, tile), serving.tokens + serving.new_tokens

    def step(params, rows, delimiter_V):
        return programs.step.__wrapped__(params, rows, delimiter_V, Plan(jnp.int32(GREEDY), capacity))

    with jax.set_mesh(mesh):
        rows = lay_out(jax.eval_shape(programs.empty), _place(mesh))
        delimiter_V = _place(mesh)(jax.ShapeDtypeStruct((vlm.config.decoder.vocab,), bool), None)
        program = jax.jit(step, donate_argnums=1, compiler_options=options(mesh))
        lowered = program.lower(params, rows, delimiter_V)
    return Job(lowered, held(params), held(rows), held(delimiter_V), tuple(jax.tree.leaves(rows)))


def _engine(vlm: VLM, serving: Serving, mesh: Mesh, tile: TileShape) -> Programs:
    """The programs of an engine of such rows. Raises ValueError for rows that the mesh does not split evenly."""
    _check_rows(serving, mesh)
    shape = PoolShape(serving.rows, serving.tokens + serving.new_tokens, serving.tokens, serving.tiles)
    return compiled(vlm, mesh, shape, tile)


def _check_rows(serving: Serving, mesh: Mesh) -> None:
    if serving.rows % batch_shards(mesh):
        raise ValueError(f"mesh.data x mesh.fsdp = {batch_shards(mesh)} must divide --rows {serving.rows}")


def decide_job(experiment: Experiment, serving: Serving, mesh: Mesh) -> Job:
    """Scoring labels behind the samples of packed rows, which are read without a cache; see `shows_kept`."""
    vlm, params = VLM(experiment.model), _serving_params(experiment, mesh)
    _check_rows(serving, mesh)
    with jax.set_mesh(mesh):
        batch = _batch(experiment.tile, (serving.rows,), serving.tokens, serving.tiles, batch_sharding(mesh))
        place, vocab, visual = _place(mesh), vlm.config.decoder.vocab, None
        if shows_kept(experiment, serving, mesh):
            seen = jax.eval_shape(vlm.see, params, batch.views)
            visual = jax.tree.map(lambda x: place(x, *(None,) * x.ndim), seen)
            pixels = jax.eval_shape(lambda x: x[:, :0], batch.views.pixels_BISSc)
            batch = batch.replace(pixels_BISSc=place(pixels, None))
        labels_K = place(jax.ShapeDtypeStruct((LABELS,), jnp.int32), None)
        is_label_K, banned_V = (place(jax.ShapeDtypeStruct((size,), bool), None) for size in (LABELS, vocab))
        ends_BN = place(jax.ShapeDtypeStruct((serving.rows, ENDS), jnp.int32), "batch", None)
        given = visual, labels_K, is_label_K, ends_BN, banned_V
        lowered = labels_program(vlm, mesh).lower(params, batch, *given)
    return Job(lowered, held(params), 0, held((batch, given)))


def shows_kept(experiment: Experiment, serving: Serving, mesh: Mesh) -> bool:
    """Whether an engine on such a mesh keeps what it has seen, so that decisions are made without the vision tower."""
    vlm = VLM(experiment.model)
    views = Batch.empty((1,), serving.tokens, serving.tiles, experiment.tile).views
    return not unkept(vlm, mesh, jax.eval_shape(vlm.see, vlm.abstract(), views))


def look_job(experiment: Experiment, serving: Serving, mesh: Mesh) -> Job:
    """Taking the next frame of each of as many streams as there are rows; what is kept of them is donated."""
    vlm, params = VLM(experiment.model), _serving_params(experiment, mesh)

    def look(params, state, views):
        return lay_out(vlm.look(params, state, views))

    with jax.set_mesh(mesh):
        state = _watched(vlm, params, serving.rows, mesh)
        views = _batch(experiment.tile, (serving.rows,), 0, 1, batch_sharding(mesh)).views
        lowered = jax.jit(look, donate_argnums=1, compiler_options=options(mesh)).lower(params, state, views)
    return Job(lowered, held(params), held(state), held(views), tuple(jax.tree.leaves(state)))


def ask_job(experiment: Experiment, serving: Serving, mesh: Mesh) -> Job:
    """Reading a question about each stream, behind the visual tokens of what is kept, which stays."""
    vlm, params = VLM(experiment.model), _serving_params(experiment, mesh)

    def ask(params, state, text, capacity):
        visual = vlm.recollect(params, state)
        hidden_BD, read = vlm.extend(params, vlm.begin(_lengths(text), capacity), text, visual)
        return constrain(vlm.score(params, hidden_BD), "batch", "vocab"), lay_out(read)

    with jax.set_mesh(mesh):
        state = _watched(vlm, params, serving.rows, mesh)
        tokens, _ = asked(vlm, serving)
        text = _batch(experiment.tile, (serving.rows,), tokens, 0, batch_sharding(mesh)).text
        program = jax.jit(ask, static_argnums=3, compiler_options=options(mesh))
        lowered = program.lower(params, state, text, tokens + serving.new_tokens)
    return Job(lowered, held(params), held(state), held(text), tuple(jax.tree.leaves(state)))


def asked(vlm: VLM, serving: Serving) -> tuple[int, int]:
    """Token slots of a question and of the visual tokens that it is about, and the frames that these are of."""
    kept = jax.eval_shape(lambda params: vlm.recollect(params, vlm.watch(params, 1)), vlm.abstract())
    visual = kept.tokens_BMD.shape[1]
    return bucket(visual + serving.tokens, TEXT_BUCKET), visual // vlm.tokens_per_tile


def _lengths(text: Text) -> jax.Array:
    return (text.segments_BT > 0).sum(-1, dtype=jnp.int32)


def _watched(vlm: VLM, params: Any, streams: int, mesh: Mesh) -> Any:
    """Shapes of what is kept of streams. Raises ValueError for a memory that keeps nothing of them."""
    state = jax.eval_shape(lambda params: vlm.watch(params, streams), params)
    return lay_out(state, lambda x, *axes: _placed(x, NamedSharding(mesh, even_spec(x.shape, *axes))))


def _place(mesh: Mesh) -> Callable[..., jax.ShapeDtypeStruct]:
    """Of an array, as its axes say."""
    return lambda x, *axes: _placed(x, NamedSharding(mesh, even_spec(x.shape, *axes)))


def _serving_params(experiment: Experiment, mesh: Mesh) -> dict:
    """Parameters as `load_model` holds them."""
    vlm = VLM(experiment.model)
    return vlm.held(param_shardings(mesh, vlm.abstract(), vlm.axes()))


def _placed(x: jax.ShapeDtypeStruct, place) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def compile_job(job: Job) -> tuple[Compilation, Future[HloProgram | None]]:
    """Compiles a job with the options of its own program, and waits for what a first answer needs.

    The compiler decides first what runs when and where each array lies, then writes machine code, which takes most of
    its time. The future is of the program with the estimates of cycles that come of the latter; it raises ValueError
    for a kernel that the compiler refuses. The thread behind it does not keep the process alive. A program that does
    not fit the chip's memory gets no machine code (None), but is described all the same. Raises ValueError for what is
    refused at once.
    """
    with tempfile.TemporaryDirectory(prefix="vlmem_compile_", ignore_cleanup_errors=True) as folder:
        code = _compiled_in(folder, job.lowered)
        while not code.done() and not any(Path(folder).glob(f"*{LAST_WRITTEN}")):
            time.sleep(POLL_SECONDS)
        fits = not code.done() or code.result() is not None
        written = {kind: _read(folder, kind) for kind in ("after_optimizations.txt", "buffer-assignment.txt")}
    program, assignment = HloProgram(written["after_optimizations.txt"]), written["buffer-assignment.txt"]
    temporary = temporary_bytes(assignment)
    peak = job.parameters + job.state + job.inputs + temporary
    return Compilation(program, fits, temporary, peak, buffers(assignment, program)), code


def _compiled_in(folder: str, lowered: jax.stages.Lowered) -> Future[HloProgram | None]:
    """Compiles in a thread, and has the compiler describe the program in files of `folder`."""
    dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_module_re": "jit_.*"}
    code: Future[HloProgram | None] = Future()

    def work() -> None:
        try:
            code.set_result(HloProgram(lowered.compile(compiler_options=dump).as_text()))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error) and not re.search(r"space[ =][vs]mem", str(error)):
                code.set_result(None)
                return
            refused = ValueError(f"the compiler refuses the program: {str(error)[:2000]}")
            refused.__cause__ = error
            code.set_exception(refused)
        except BaseException as error:
            code.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return code


def held(tree) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def batch_shapes(experiment: Experiment, stage: StageConfig, mesh: Mesh) -> Batch:
    """Shapes of one step's batch, with leading axes [accumulation, rows]."""
    data = experiment.data_of(stage)
    parts = experiment.parts(stage, mesh)
    return _batch(
        experiment.tile,
        (parts, data.rows // parts),
        data.pack_tokens,
        data.pack_tiles,
        batch_sharding(mesh, leading=1),
    )


def _batch(tile: TileShape, rows: tuple[int, ...], T: int, I: int, sharding: NamedSharding) -> Batch:  # noqa: E741
    row = Batch.empty((), T, I, tile)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*rows, *x.shape), x.dtype, sharding=sharding), row)


def _read(folder: str, ending: str) -> str:
    """The largest file of that kind that the compiler wrote: that of the program, not of a helper of it."""
    files = sorted(Path(folder).glob(f"*{ending}"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""
