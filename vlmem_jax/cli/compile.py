"""Compile the training step for a TPU slice that need not be there: memory, exchanges, predicted time."""

import argparse
import dataclasses
import json
import time
from pathlib import Path

import jax

from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import ConfigError
from vlmem_jax.flight import Report, Topology, check, tpu_devices
from vlmem_jax.sharding import make_mesh
from vlmem_jax.train.config import experiment

EXAMPLE = "vlmem compile --config configs/comemo_9b.py --topology v5p:4x4x4 --config.data.rows=64"

SHOWN = 12
"""Exchanges in the table."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem compile`."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="slice, such as v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--stage", help="stage whose step to compile (default: the last)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")


def run(args: argparse.Namespace) -> int:
    """0 when it compiles."""
    jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, not to look for a TPU
    settings, topology = experiment(args.experiment), Topology(args.topology)
    stages = {stage.name: stage for stage in settings.stages}
    name = args.stage or settings.stages[-1].name
    if name not in stages:
        raise ConfigError(f"there is no stage {name!r}; the experiment has {', '.join(stages)}")
    devices = tpu_devices(topology)
    mesh = make_mesh(settings.mesh, devices)
    print(f"compiling stage {name} for {len(devices)} chips, mesh {dict(mesh.shape)} ...", flush=True)
    start = time.perf_counter()
    report = check(settings, stages[name], topology, mesh)
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    print("\n".join(lines(report)))
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    return 0


def lines(report: Report) -> list[str]:
    """The report as text."""
    said = ["", "memory of a chip"]
    for key in ("argument", "temp", "peak"):
        said.append(f"  {key:10}{getattr(report, f'{key}_bytes') / 2**30:9.2f} GiB")
    said.append(f"  the peak is {report.hbm_share:.0%} of its HBM")
    said += ["", f"{'exchange':20}{'over':16}{'MiB':>10}{'times':>7}  shape"]
    for c in report.collectives[:SHOWN]:
        said.append(f"  {c.kind:18}{'+'.join(c.axes) or '?':16}{c.bytes / 2**20:10.1f}{c.times:7}  {list(c.shape)}")
    if len(report.collectives) > SHOWN:
        said.append(f"  and {len(report.collectives) - SHOWN} more kinds, all of fewer bytes")
    for c in report.activation_gathers:
        said.append(f"  activations over fsdp: {c.kind} of {list(c.shape)}, {c.times} times, from {c.source}")
    said += [
        "",
        "predicted, not measured",
        f"  compiler's estimate {report.cycles_seconds:.3f} s, attention kernels {report.kernel_seconds:.3f} s, "
        f"links {report.exchange_seconds:.3f} s",
        f"  a step takes {report.predicted_step_seconds:.3f} s with exchanges hidden, "
        f"{report.exposed_step_seconds:.3f} s without",
        f"  MFU {report.predicted_mfu:.1%} (causal attention halved, recomputation left out)",
    ]
    return said
