"""The flight check: does a program fit, what does it exchange, and how fast should it be."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future

from jax.sharding import Mesh

from kernels_pallas.device import Peak
from kernels_pallas.memory_attention.blocks import LANES, up
from vlmem_jax.flight import roofline
from vlmem_jax.flight.chips import Topology
from vlmem_jax.flight.compile import (
    Job,
    Learning,
    Serving,
    ask_job,
    asked,
    compile_job,
    decide_job,
    decode_job,
    look_job,
    prefill_job,
    rl_job,
    shows_kept,
    train_job,
)
from vlmem_jax.flight.memory import Buffer
from vlmem_jax.flight.program import Collective, HloProgram, Instruction
from vlmem_jax.models import VLM
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.models.flops import (
    ask_flops,
    decide_flops,
    decode_flops,
    formation_flops,
    look_flops,
    prefill_flops,
    train_flops,
)
from vlmem_jax.train.config import Experiment, StageConfig
from vlmem_jax.train.stages import Split
from vlmem_jax.trees import flatten

SMALL = 2**20
"""Exchanges of fewer bytes are not worth a flag: norms, counts, losses."""
SHOWN_BUFFERS = 12
LARGE = 10
"""Of what is carried, arrays of at least a tenth of the largest count as large."""
KERNEL_UTILISATION = {
    ("memory_attention", "forward"): {"v5e": 0.96, "v5p": 0.95, "v6e": 0.45},
    ("memory_attention", "backward"): {"v5e": 0.97, "v5p": 0.97, "v6e": 0.45},
    ("causal_attention", "forward"): {"v5e": 1.01, "v5p": 1.01, "v6e": 0.45},
    ("causal_attention", "backward"): {"v5e": 1.02, "v5p": 1.02, "v6e": 0.45},
    ("cached_attention", "forward"): {"v5e": 0.91, "v5p": 0.91, "v6e": 0.45},
    ("splash", "forward"): {"v5e": 0.88, "v5p": 0.88, "v6e": 0.45},
    ("splash", "backward"): {"v5e": 0.93, "v5p": 0.93, "v6e": 0.45},
}
"""Of the matrix units, by the machine code of the kernels: `python -m benchmarks.tpu_static`, long memories."""
CAUSAL_KEYS = {"forward": 850, "backward": 830}
"""Of causal_attention: beside the keys that a token sees, so many more cost as much as what it does once a row does,
and as the edges of blocks: by the cases `one` and `four`."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Numbers of one compiled program, for one chip. Times are predictions, from the roofline until there is code."""

    topology: str
    slices: int
    what: str
    """train: NAME, rl: NAME, prefill, decode, decide, look or ask."""
    fits: bool
    parameter_bytes: int
    state_bytes: int
    """Of the optimizer in training, of caches in decoding, of what is kept of streams."""
    input_bytes: int
    activation_bytes: int
    """Kept by the forward pass for the backward pass."""
    temporary_bytes: int
    """All else that the program needs while it runs."""
    peak_bytes: int
    hbm_share: float
    buffers: list[Buffer]
    """The largest of activations and temporaries."""
    roofline_seconds: float
    """See `roofline.seconds`; without kernels and communication."""
    cycles_seconds: float | None
    """The compiler's estimate of the same; None before there is machine code."""
    kernel_seconds: float
    """Attention kernels at KERNEL_UTILISATION, or at the speed of memory where that is slower."""
    exchange_seconds: float
    """All collectives one after the other at full link speed."""
    memory_seconds: float
    """Of that, without exchanges, what belongs to the model's memory."""
    copies: int | None
    """Of large arrays of what is carried from call to call; None where nothing is."""
    predicted_step_seconds: float
    """If communication is hidden as far as can be."""
    exposed_step_seconds: float
    """If none of it is."""
    flops: int
    """Useful FLOPs of the whole step, see `models.flops`."""
    samples: int
    """Of a pack, all alike: attention between them is not useful."""
    shape_flops: int
    """Of the shapes, as if each pack were one sample."""
    predicted_mfu: float
    exposed_mfu: float
    predicted_utilisation: float
    """Of the shapes: what the MFU would be of packs of one sample."""
    collectives: list[Collective]
    activation_gathers: list[Collective]
    """Exchanges over fsdp of something that is no parameter: the sharding is at fault."""


Finish = Callable[[], Report]
"""Waits for the machine code; raises ValueError where there can be none, see `compile_job`."""


def check_training(
    experiment: Experiment, stage: StageConfig, topology: Topology, mesh: Mesh, samples: int = 1
) -> tuple[Report, Finish]:
    """What the compiler makes of a stage's step for `mesh`, which is of that topology.

    Useful are FLOPs of full packs of so many `samples`. The times of the report are those of the roofline; the function
    waits for the machine code, and gives a report with those of the compiler's estimates.
    """
    data = experiment.data_of(stage)
    trained = Split.of(stage, list(flatten(VLM(experiment.model).abstract()))).trainable
    shapes, model = [(data.pack_tokens, data.pack_tiles)] * data.rows, experiment.model
    alike = [(tokens // samples, tiles // samples) for tokens, tiles in shapes] * samples
    flops, shape_flops = train_flops(model, alike, trained), train_flops(model, shapes, trained)
    job = train_job(experiment, stage, mesh)
    return _report(job, f"train: {stage.name}", shape_flops, model, topology, mesh, samples, flops / shape_flops)


def check_learning(
    experiment: Experiment, stage: StageConfig, learning: Learning, topology: Topology, mesh: Mesh
) -> tuple[Report, Finish]:
    """As `check_training`, of the step of a `grpo` stage."""
    job, model = rl_job(experiment, stage, learning, mesh), experiment.model
    T, I, J, L = learning.sizes(experiment, stage, mesh)
    rows = learning.rows(experiment, stage, mesh).beta_B.size
    trained = Split.of(stage, list(flatten(VLM(model).abstract()))).trainable
    flops = train_flops(model, [(T, I)] * rows, trained)
    if VLM(model).speech:
        flops += rows * J * formation_flops(model, L, trained)
    return _report(job, f"rl: {stage.name}", flops, model, topology, mesh)


def check_serving(
    experiment: Experiment, what: str, serving: Serving, topology: Topology, mesh: Mesh, samples: int = 1
) -> tuple[Report, Finish]:
    """As `check_training`, of `what`, prefill, decode, decide, look or ask, of these shapes; `samples` are those of a
    row of decide."""
    model, rows = experiment.model, serving.rows
    if what == "decide":
        shape, is_seen = (rows, serving.tokens, serving.tiles), shows_kept(experiment, serving, mesh)
        flops, shape_flops = (decide_flops(model, *shape, count, is_seen) for count in (samples, 1))
        job = decide_job(experiment, serving, mesh)
        return _report(job, what, shape_flops, model, topology, mesh, samples, flops / shape_flops)
    if what == "look":
        return _report(look_job(experiment, serving, mesh), what, look_flops(model, rows), model, topology, mesh)
    if what == "ask":
        tokens, frames = asked(VLM(model), serving)
        flops = ask_flops(model, rows, tokens, frames)
        return _report(ask_job(experiment, serving, mesh), what, flops, model, topology, mesh)
    make, count = {"prefill": (prefill_job, prefill_flops), "decode": (decode_job, decode_flops)}[what]
    flops = count(experiment.model, serving.rows, serving.tokens, serving.tiles)
    return _report(make(experiment, serving, mesh), what, flops, experiment.model, topology, mesh)


def _report(
    job: Job,
    what: str,
    flops: int,
    model: ModelConfig,
    topology: Topology,
    mesh: Mesh,
    samples: int = 1,
    useful: float = 1.0,
) -> tuple[Report, Finish]:
    """`flops` are of the shapes; the part `useful` of them are of packs of so many `samples`."""
    (done, code), chip = compile_job(job), topology.chip
    collectives = sorted(done.program.collectives(dict(mesh.shape)), key=lambda c: -c.bytes * c.times)
    kernels = kernel_seconds(done.program, topology, samples=samples)
    longer = kernel_seconds(done.program, topology) - kernels
    exchange = sum(c.times * topology.seconds(c.kind, c.bytes, c.devices, c.axes) for c in collectives)
    kept = sum(buffer.bytes for buffer in done.buffers if buffer.for_backward)
    inside = roofline.seconds(done.program, chip.peak)
    remembering = functools.partial(_of_memory, done.program)
    in_memory = roofline.seconds(done.program, chip.peak, remembering)
    large = [math.prod(x.sharding.shard_shape(x.shape)) for x in job.carried]
    large = {size for size in large if size * LARGE >= max(large)}
    report = Report(
        topology=topology.name,
        slices=topology.slices,
        what=what,
        fits=done.fits,
        parameter_bytes=job.parameters,
        state_bytes=job.state,
        input_bytes=job.inputs,
        activation_bytes=kept,
        temporary_bytes=done.temporary - kept,
        peak_bytes=done.peak,
        hbm_share=done.peak / chip.hbm_bytes,
        buffers=done.buffers[:SHOWN_BUFFERS],
        roofline_seconds=inside,
        cycles_seconds=None,
        kernel_seconds=kernels,
        exchange_seconds=exchange,
        memory_seconds=in_memory + kernel_seconds(done.program, topology, remembering),
        copies=done.program.copies(large) if large else None,
        flops=round(useful * flops),
        samples=samples,
        shape_flops=flops,
        collectives=collectives,
        activation_gathers=activation_gathers(collectives, _shapes(VLM(model)), mesh.shape),
        **_times(inside + kernels, exchange, round(useful * flops), flops, topology, longer),
    )
    return report, functools.partial(_timed, report, code, topology)


def _timed(report: Report, code: Future[HloProgram | None], topology: Topology) -> Report:
    """With what the compiler's estimates of cycles say; a program that does not fit has none."""
    program = code.result()
    if program is None:
        return report
    cycles = program.cycles() / topology.chip.clock
    remembering = functools.partial(_of_memory, program)
    in_memory = program.cycles(remembering) / topology.chip.clock + kernel_seconds(program, topology, remembering)
    longer = kernel_seconds(program, topology) - kernel_seconds(program, topology, samples=report.samples)
    inside, exchange = cycles + report.kernel_seconds, report.exchange_seconds
    times = _times(inside, exchange, report.flops, report.shape_flops, topology, longer)
    return dataclasses.replace(report, cycles_seconds=cycles, memory_seconds=in_memory, **times)


def _of_memory(program: HloProgram, instruction: Instruction) -> bool:
    return any("vlmem_jax/memory/" in source for source in program.sources(instruction))


def _times(
    inside: float, exchange: float, flops: int, shape_flops: int, topology: Topology, longer: float
) -> dict[str, float]:
    """The times of a step that computes for `inside` seconds and exchanges for `exchange`; with packs of one sample it
    would compute for `longer` more."""
    hidden, exposed = max(inside, exchange), inside + exchange
    peak_flops = topology.chips * topology.chip.peak.flops
    return dict(
        predicted_step_seconds=hidden,
        exposed_step_seconds=exposed,
        predicted_mfu=flops / (peak_flops * hidden),
        exposed_mfu=flops / (peak_flops * exposed),
        predicted_utilisation=shape_flops / (peak_flops * max(inside + longer, exchange)),
    )


def _shapes(model: VLM) -> set[tuple[int, ...]]:
    """Of all parameters, also with heads as wide as kernels read them."""
    shapes, axes = flatten(model.abstract()), flatten(model.axes())
    found = {leaf.shape for leaf in shapes.values()}
    for path, leaf in shapes.items():
        names = (None,) * (leaf.ndim - len(axes[path])) + axes[path]
        sizes = zip(leaf.shape, names, strict=True)
        found.add(tuple(up(size, LANES) if name == "head_dim" else size for size, name in sizes))
    return found


def activation_gathers(
    collectives: list[Collective], params: Iterable[tuple[int, ...]], mesh: Mapping[str, int]
) -> list[Collective]:
    """Exchanges over fsdp of as many elements as no parameter, and no layer of a stack of them, has.

    A parameter may be cut by tensor parallelism, and what is passed on around a ring is a device's own part of it.
    """
    whole = {math.prod(shape[n:]) for shape in params for n in range(len(shape) + 1)}
    whole |= {size / mesh["tensor"] for size in whole}
    passed = {size / mesh["fsdp"] / halves for size in whole for halves in (1, 2)}  # both ways round the ring

    def known(c: Collective) -> bool:
        return math.prod(c.shape) in (passed | whole if c.kind == "collective-permute" else whole)

    return [c for c in collectives if "fsdp" in c.axes and c.bytes >= SMALL and not known(c)]


def kernel_seconds(
    program: HloProgram,
    topology: Topology,
    counts: Callable[[Instruction], bool] = lambda instruction: True,
    samples: int = 1,
) -> float:
    """Of the attention kernels that count, on one chip: matmuls, causal ones of packs of so many samples, or reading
    the operands, if that is longer."""
    total, name, peak = 0.0, topology.name.partition(":")[0], topology.chip.peak
    for instruction, times in program:
        found = re.search(r"(memory_attention|causal_attention|cached_attention|splash)\w*", instruction.rest)
        if 'custom_call_target="tpu_custom_call"' not in instruction.rest or found is None or not counts(instruction):
            continue
        arrays = re.findall(r"(?:bf16|f32)\[([\d,]+)\]", instruction.rest + instruction.type)
        shapes = [tuple(int(size) for size in sizes.split(",")) for sizes in arrays]
        direction = "backward" if "backward" in instruction.rest or "dkv" in instruction.rest else "forward"
        if found[1] == "cached_attention":  # of the cache [L, B, K, S, C], a layer is read
            shapes = [shape[1:] if len(shape) == 5 else shape for shape in shapes]
        flops = _attention_flops(found[1], shapes, direction, samples)
        total += times * _attention_seconds(peak, flops, shapes, KERNEL_UTILISATION[found[1], direction][name])
    return total


def _attention_flops(name: str, shapes: list[tuple[int, ...]], direction: str, samples: int) -> int:
    products = 5 if direction == "backward" else 2
    q, k = shapes[0], shapes[1]
    if name == "cached_attention":  # q [B, T, heads of 128 lanes] and k [B, K, S, 128], all slots filled
        return 2 * products * math.prod(q) * k[2]
    if name == "splash":  # q [H, T, C] and k [K, S, C], perhaps with a batch axis in front
        return products * math.prod(q) * k[-2]
    if name == "causal_attention":  # q [B, T, heads of 128 lanes]
        return 2 * products * math.prod(q) * (q[1] // (2 * samples) + CAUSAL_KEYS[direction])
    # q [B, T, units of 128 lanes], k [B, M, units], lse [B, units, heads of one, T]; each head takes all 128 lanes
    lse = next(shape for shape in shapes if len(shape) == 4)
    return 2 * products * math.prod(lse) * k[1] * LANES


def _attention_seconds(peak: Peak, flops: int, shapes: list[tuple[int, ...]], utilisation: float) -> float:
    read = 2 * sum(math.prod(shape) for shape in shapes[:3])  # q, k and v in bf16
    return max(flops / (peak.flops * utilisation), read / peak.hbm)
