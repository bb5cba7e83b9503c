"""A training step compiled for devices that need not be there."""

import os

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmem_jax.flight.chips import Topology
from vlmem_jax.models import VLM
from vlmem_jax.sharding import batch_sharding
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.loop import Program
from vlmem_jax.train.next_token import NextTokenLoss
from vlmem_jax.types import Batch

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Keeps libtpu from asking a cloud host what it runs on."""


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The chips of a slice, to compile for.

    Needs the package libtpu (extra `tpu`), which one process at a time can use. Raises ValueError for a slice that does
    not exist.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            raise ValueError("another process is compiling for TPUs; libtpu serves one at a time, try again") from error
        raise ValueError(f"there is no slice {topology.name}: {error}") from error


def compile_step(experiment: Experiment, stage: StageConfig, mesh: Mesh) -> jax.stages.Compiled:
    """The very step that `vlmem train` runs in `stage`, without parameters, data or devices."""
    model = VLM(experiment.model)
    task = NextTokenLoss(model, experiment.loss_chunk)
    program = Program(task, experiment, stage, mesh)
    _, frozen = program.split.part(program.held)
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        batch = batch_shapes(experiment, stage, mesh)
        denominator = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
        return program.step.lower(program.state, frozen, batch, denominator).compile()


def batch_shapes(experiment: Experiment, stage: StageConfig, mesh: Mesh) -> Batch:
    """Shapes of one step's batch, with leading axes [accumulation, rows]."""
    data, model = experiment.data_of(stage), VLM(experiment.model)
    T, I, S = data.pack_tokens, data.pack_tiles, experiment.model.vision.image_size
    rows, M = (stage.accumulation, data.rows // stage.accumulation), I * model.tokens_per_tile
    sharding = batch_sharding(mesh, leading=1)

    def leaf(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*rows, *shape), dtype, sharding=sharding)

    return Batch(
        tokens_BT=leaf(T),
        targets_BT=leaf(T),
        weights_BT=leaf(T, dtype=jnp.float32),
        positions_BT=leaf(T),
        segments_BT=leaf(T),
        slots_BT=leaf(T),
        pixels_BISSc=leaf(I, S, S, 3, dtype=jnp.uint8),
        memory_positions_BM=leaf(M),
        memory_segments_BM=leaf(M),
    )
