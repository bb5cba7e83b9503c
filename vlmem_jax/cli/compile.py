"""Compile the training step for a TPU slice that need not be there, and tell what memory it takes."""

import argparse
import json
import time
from pathlib import Path

import jax

from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import ConfigError
from vlmem_jax.flight import compile_step, hbm_bytes, tpu_devices
from vlmem_jax.sharding import make_mesh
from vlmem_jax.train.config import experiment

EXAMPLE = "vlmem compile --config configs/comemo_9b.py --topology v5p:4x4x4 --config.data.rows=64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem compile`."""
    add_config(parser)
    parser.add_argument("--topology", required=True, help="slice, such as v5e:4x4 or v5p:4x4x4")
    parser.add_argument("--stage", help="stage whose step to compile (default: the last)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")


def run(args: argparse.Namespace) -> int:
    """0 when it compiles and fits."""
    jax.config.update("jax_platforms", "cpu")  # libtpu is here to compile, not to look for a TPU
    settings = experiment(args.experiment)
    stages = {stage.name: stage for stage in settings.stages}
    name = args.stage or settings.stages[-1].name
    if name not in stages:
        raise ConfigError(f"there is no stage {name!r}; the experiment has {', '.join(stages)}")
    devices = tpu_devices(args.topology)
    mesh = make_mesh(settings.mesh, devices)
    print(
        f"compiling stage {name} for {len(devices)} chips of {args.topology}, mesh {dict(mesh.shape)} ...", flush=True
    )
    start = time.perf_counter()
    memory = compile_step(settings, stages[name], mesh).memory_analysis()
    seconds = time.perf_counter() - start
    numbers = {
        "topology": args.topology,
        "stage": name,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "hbm_share": round(memory.peak_memory_in_bytes / hbm_bytes(args.topology), 4),
    }
    for key in ("argument_bytes", "temp_bytes", "peak_bytes"):
        print(f"{key.removesuffix('_bytes'):10}{numbers[key] / 2**30:8.2f} GiB a chip")
    print(f"{numbers['hbm_share']:.0%} of a chip's HBM at the peak; compiled in {seconds:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
    return 0
