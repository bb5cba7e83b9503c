"""The flight check: does a step fit, what does it exchange, and how fast should it be."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.compile import compile_step
from vlmem_jax.flight.program import Collective, HloProgram
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import train_flops
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.stages import Split, flatten

SMALL = 2**20
"""Exchanges of fewer bytes are not worth a flag: norms, counts, losses."""
KERNEL_UTILISATION = 0.9
"""Of the matrix units, assumed for attention kernels: what the compiler's cycle counts show for most of them."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Numbers of one compiled step, for one chip. Times are predictions."""

    topology: str
    stage: str
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    hbm_share: float
    cycles_seconds: float
    """The compiler's estimate, without kernels and communication."""
    kernel_seconds: float
    """Attention kernels at KERNEL_UTILISATION."""
    exchange_seconds: float
    """All collectives one after the other at full link speed."""
    predicted_step_seconds: float
    """If communication is hidden as far as can be."""
    exposed_step_seconds: float
    """If none of it is."""
    flops: int
    """Useful FLOPs of the whole step, see `models.flops`."""
    predicted_mfu: float
    collectives: list[Collective]
    activation_gathers: list[Collective]
    """Exchanges over fsdp of something that is no parameter: the sharding is at fault."""


def check(experiment: Experiment, stage: StageConfig, topology: Topology, mesh: Mesh) -> Report:
    """Compiles a stage's step for `mesh`, which is of that slice, and reads what came out."""
    compiled = compile_step(experiment, stage, mesh)
    memory, program = compiled.memory_analysis(), HloProgram(compiled.as_text())
    collectives = sorted(program.collectives(dict(mesh.shape)), key=lambda c: -c.bytes * c.times)
    params = flatten(VLM(experiment.model).abstract())
    data, trained = experiment.data_of(stage), Split.of(stage, list(params)).trainable
    flops = train_flops(experiment.model, data.rows, data.pack_tokens, data.pack_tiles, trained)
    chip = topology.chip
    cycles = program.cycles() / chip.clock
    kernels = kernel_flops(program) / (chip.flops * KERNEL_UTILISATION)
    exchange = sum(c.times * topology.seconds(c.kind, c.bytes, c.devices) for c in collectives)
    step = max(cycles + kernels, exchange)
    return Report(
        topology=topology.name,
        stage=stage.name,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        hbm_share=memory.peak_memory_in_bytes / chip.hbm_bytes,
        cycles_seconds=cycles,
        kernel_seconds=kernels,
        exchange_seconds=exchange,
        predicted_step_seconds=step,
        exposed_step_seconds=cycles + kernels + exchange,
        flops=flops,
        predicted_mfu=flops / (topology.chips * chip.flops * step),
        collectives=collectives,
        activation_gathers=activation_gathers(collectives, params),
    )


def activation_gathers(collectives: list[Collective], params: Any) -> list[Collective]:
    """Exchanges over fsdp of as many elements as no parameter, and no layer of a stack of them, has."""
    sizes = {math.prod(leaf.shape[n:]) for leaf in jax.tree.leaves(params) for n in range(leaf.ndim + 1)}
    sizes = {size / parts for size in sizes for parts in (1, *_splits(collectives))}
    return [c for c in collectives if "fsdp" in c.axes and c.bytes >= SMALL and math.prod(c.shape) not in sizes]


def _splits(collectives: list[Collective]) -> set[int]:
    """Into how many parts tensor parallelism may have cut a parameter."""
    return {c.devices for c in collectives if c.axes == ("tensor",)}


def kernel_flops(program: HloProgram) -> int:
    """FLOPs of attention kernels on one chip: of each kernel's matmuls, causal ones at half."""
    total = 0
    for instruction, times in program:
        if instruction.opcode != "custom-call":
            continue
        name = re.search(r"(memory_attention|splash)\w*", instruction.rest)
        if name is None:
            continue
        shapes = [tuple(map(int, s.split(","))) for s in re.findall(r"(?:bf16|f32)\[([\d,]+)\]", instruction.rest)]
        backward = "backward" in instruction.rest or "dkv" in instruction.rest
        total += times * _attention_flops(name[0], shapes, backward)
    return total


def _attention_flops(name: str, shapes: list[tuple[int, ...]], backward: bool) -> int:
    products = 5 if backward else 2
    q, k = shapes[0], shapes[1]
    if name.startswith("splash"):  # q [H, T, C] and k [K, S, C], perhaps with a batch axis in front
        return products * math.prod(q) * k[-2]
    return 2 * products * math.prod(q) * k[1]  # q [B, T, H*C], k [B, M, K*C]
