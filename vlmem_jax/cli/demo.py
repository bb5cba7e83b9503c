"""Train a small CoMemo on mosaics of handwritten digits and write report.html: minutes on two CPU cores."""

import argparse
from pathlib import Path

import jax

from vlmem_jax.demo.config import Recipe
from vlmem_jax.demo.job import Interrupted
from vlmem_jax.demo.run import closing_words, run_demo

EXAMPLE = "vlmem demo --workdir runs/demo --compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem demo`."""
    parser.add_argument("--workdir", default="runs/demo", help="folder of everything it makes (default: %(default)s)")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also train without memory and with other positions, in the same number of steps",
    )
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, metavar="X", help="times all steps and pictures, to try things out"
    )


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: the same command goes on from there."""
    workdir = Path(args.workdir)
    if jax.config.jax_compilation_cache_dir is None:  # its runs, and those of --compare, share most of their programs
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    try:
        summary = run_demo(workdir, Recipe.scaled(args.steps_scale), args.compare)
    except Interrupted:
        return 0
    print(closing_words(summary, workdir))
    return 0
