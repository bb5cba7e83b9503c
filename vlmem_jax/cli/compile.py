"""Compile training or serving for a TPU slice that need not be there: memory, exchanges, predicted time."""

import argparse
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import ConfigError, override
from vlmem_jax.flight import (
    Finish,
    Learning,
    Report,
    Serving,
    Topology,
    check_learning,
    check_serving,
    check_training,
    remedies,
    tpu_devices,
)
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import serving_mesh, whole_heads
from vlmem_jax.runtime.sharding import batch_shards, make_mesh
from vlmem_jax.train.config import Experiment, StageConfig, experiment

EXAMPLE = "vlmem compile --config configs/comemo_9b.py --topology v5p:4x4x4"

SHOWN = 12
"""Exchanges in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem compile`."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="slice, such as v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1, help="how many of them; mesh.data goes over them (default: 1)")
    parser.add_argument(
        "--what",
        choices=("train", "rl", "prefill", "decode", "decide", "look", "ask"),
        default="train",
        help="which program; decide: labels are scored behind packed prompts; look: the next frame of a stream; ask: a "
        "question about one (default: train)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument(
        "--no-code",
        action="store_true",
        help="stop at memory, exchanges and a first estimate of the time: machine code, most of the work, gives a "
        "better one and tells whether kernels compile",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--stage", help="stage whose step to compile (default: the last)")
    training.add_argument("--packs", type=int, help="packs a chip in each step, in place of data.rows")
    training.add_argument(
        "--samples",
        type=int,
        default=1,
        help="samples of a pack, all alike, by which useful FLOPs count; of decide, too (default: 1)",
    )
    training.add_argument(
        "--no-remedies", action="store_true", help="do not compile again with other settings if it does not fit"
    )
    serving = parser.add_argument_group(
        "rl, prefill, decode, decide, look and ask",
        "All but rl are laid out as by `vlmem generate`, or by --config.mesh.AXIS=N.",
    )
    serving.add_argument(
        "--rows", type=int, help="prompts in a batch, or streams (default: one for each part of the mesh's rows)"
    )
    serving.add_argument(
        "--tokens",
        type=int,
        help="token slots of a prompt, or of a row of decide (default: 4096); ask: of a question beside what it is "
        "about (default: 128)",
    )
    serving.add_argument("--tiles", type=int, default=13, help="image tiles of a prompt (default: 13)")
    serving.add_argument("--new-tokens", type=int, default=256, help="tokens that follow (default: 256)")
    serving.add_argument(
        "--memories", type=int, default=4, help="rl: memories in an answer, where a memory speaks (default: 4)"
    )


def run(args: argparse.Namespace) -> int:
    """0 when it fits the chips, 1 when it does not."""
    jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, not to look for a TPU
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no file of the compiler stays behind
    settings, topology = experiment(args.experiment), Topology(args.topology, args.slices)
    stage = _stage(settings, args.stage)
    wanted = {"next_token": "train", "grpo": "rl"}.get(stage.task_kind)
    if args.what in ("train", "rl") and args.what != wanted:
        hint = f"compile it with --what {wanted}" if wanted else "name a stage of next_token or grpo with --stage"
        raise ConfigError(f"the task of stage {stage.name} is {stage.task_kind}: {hint}")
    devices = tpu_devices(topology)
    vlm, answers = VLM(settings.model), args.what not in ("train", "rl")
    if answers and not any(key.partition(".")[0] == "mesh" for key in args.overrides):
        settings = dataclasses.replace(settings, mesh=serving_mesh(vlm, devices))
    mesh = make_mesh(settings.mesh, devices)
    config = args.experiment
    tokens = args.tokens or (128 if args.what == "ask" else 4096)
    if args.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {args.samples}")
    if args.packs is not None:
        if args.packs < 1:
            raise ConfigError(f"--packs must be at least 1, got {args.packs}")
        config = override(config, {"data.rows": args.packs * batch_shards(mesh)})
        settings = experiment(config)
        stage = _stage(settings, args.stage)

    def check(settings: Experiment) -> tuple[Report, Finish]:
        mesh = make_mesh(settings.mesh, devices)
        if args.what == "train":
            return check_training(settings, _stage(settings, args.stage), topology, mesh, args.samples)
        if args.what == "rl":
            learning = Learning(tokens, args.tiles, args.memories)
            return check_learning(settings, _stage(settings, args.stage), learning, topology, mesh)
        serving = Serving(args.rows or batch_shards(mesh), tokens, args.tiles, args.new_tokens)
        return check_serving(settings, args.what, serving, topology, mesh, args.samples)

    name = f"stage {stage.name}" if args.what in ("train", "rl") else args.what
    print(f"compiling {name} for {len(devices)} chips, mesh {dict(mesh.shape)} ...", flush=True)
    for words in whole_heads(vlm, mesh, vlm.dtype.itemsize if answers else 4, cache=answers):
        print(words, flush=True)
    start = time.perf_counter()

    def say(report: Report, text: list[str]) -> None:
        print("\n".join(text), flush=True)
        if args.json:
            args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")

    report, finish = check(settings)
    print(f"memory is laid out after {time.perf_counter() - start:.0f} s", flush=True)
    say(report, lines(report) + times(report))
    if report.fits and not args.no_code:
        print("\nwriting machine code, which tells the time better ...", flush=True)
        report = finish()
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
        say(report, times(report))
    if not report.fits and args.what == "train" and not args.no_remedies:
        for words in _try_remedies(config, settings, stage, mesh, report, check):
            print(words, flush=True)
    return 0 if report.fits else 1


def _stage(settings: Experiment, name: str | None) -> StageConfig:
    stages = {stage.name: stage for stage in settings.stages}
    name = name or settings.stages[-1].name
    if name not in stages:
        raise ConfigError(f"there is no stage {name!r}; the experiment has {', '.join(stages)}")
    return stages[name]


def _try_remedies(config: ConfigDict, settings: Experiment, stage, mesh, report: Report, check) -> Iterator[str]:
    tried = remedies(settings, stage, mesh)
    yield f"\nwhat may help, each compiled alone ({len(tried)} to try; the peak was {_gib(report.peak_bytes)})"
    for changes in tried:
        words = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        try:
            other, finish = check(experiment(override(config, changes)))
            other = finish()
        except ValueError as error:
            yield f"  {words}: {str(error).splitlines()[0]}"
            continue
        saved, verdict = report.peak_bytes - other.peak_bytes, "fits" if other.fits else "does not fit"
        step = f", a step takes {_time(other.predicted_step_seconds)}" if other.fits else ""
        yield f"  {words}: peak {_gib(other.peak_bytes)}, {_gib(saved)} less; {verdict}{step}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def lines(report: Report) -> list[str]:
    """The report as text."""
    state = {"decode": "caches", "look": "streams", "ask": "streams"}.get(report.what, "optimizer")
    parts = {"parameters": "parameter", state: "state", "inputs": "input", "activations": "activation"}
    parts |= {"temporaries": "temporary", "peak": "peak"}
    said = ["", "memory of a chip"]
    said += [f"  {title:12}{_gib(getattr(report, f'{name}_bytes')):>12}" for title, name in parts.items()]
    if report.fits:
        said.append(f"  the peak is {report.hbm_share:.0%} of its HBM")
    else:
        said += [f"  IT DOES NOT FIT: {report.hbm_share:.0%} of its HBM. The largest arrays:"]
        said += [f"  {_gib(b.bytes):>12}  {b.type:32}{b.source or b.operation}" for b in report.buffers]
    said += ["", f"{'exchange':20}{'over':16}{'MiB':>10}{'times':>7}  shape"]
    for c in report.collectives[:SHOWN]:
        said.append(f"  {c.kind:18}{'+'.join(c.axes) or '?':16}{c.bytes / 2**20:10.1f}{c.times:7}  {list(c.shape)}")
    if len(report.collectives) > SHOWN:
        said.append(f"  and {len(report.collectives) - SHOWN} more kinds, all of fewer bytes")
    for c in report.activation_gathers:
        said.append(f"  ACTIVATIONS over fsdp: {c.kind} of {list(c.shape)}, {c.times} times, from {c.source}")
    return said


def times(report: Report) -> list[str]:
    """The predictions as text."""
    if report.cycles_seconds is None:
        how = f"first estimate, by products and memory traffic: {_time(report.roofline_seconds)}"
        where = ["  (near the better one for large training steps, else a bound from below)"]
    else:
        how, where = f"compiler's estimate {_time(report.cycles_seconds)}", []
    more = []
    if report.memory_seconds:
        share = report.memory_seconds / report.predicted_step_seconds
        more.append(f"  the model's memory takes {_time(report.memory_seconds)} of it, {share:.1%} of a step")
    if report.copies is not None:
        more.append(f"  large arrays that are carried from call to call are copied {report.copies} times")
    return [
        "",
        "predicted, not measured",
        f"  {how}, attention kernels {_time(report.kernel_seconds)}, links {_time(report.exchange_seconds)}",
        *where,
        *more,
        f"  a step takes {_time(report.predicted_step_seconds)} with exchanges hidden, "
        f"{_time(report.exposed_step_seconds)} without",
        f"  MFU {report.predicted_mfu:.1%}, {report.exposed_mfu:.1%} without, samples a pack: {report.samples} (causal "
        "attention halved, recomputation left out)",
        f"  utilisation of the shapes {report.predicted_utilisation:.1%}, which is the MFU at one sample a pack",
    ]
