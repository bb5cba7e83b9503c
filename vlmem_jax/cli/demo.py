"""Train a small model with memory on pictures of handwritten digits and write report.html: minutes on two CPU cores."""

import argparse
from pathlib import Path

import jax

from vlmem_jax.demo.job import Interrupted
from vlmem_jax.demo.table import DEFAULT, DEMOS

EXAMPLE = f"""vlmem demo --workdir runs/demo --compare
  vlmem demo --memory {list(DEMOS)[-1]}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem demo`."""
    about = "; ".join(f"{memory}, {demo.about}" for memory, demo in DEMOS.items())
    parser.add_argument("--memory", choices=tuple(DEMOS), default=DEFAULT, help=f"{about} (default: %(default)s)")
    folders = ", ".join(f"{demo.folder} for {memory}" for memory, demo in DEMOS.items())
    parser.add_argument("--workdir", help=f"folder of everything it makes (default: {folders})")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the full table: " + "; ".join(f"of {memory}, {demo.more}" for memory, demo in DEMOS.items()),
    )
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, metavar="X", help="times all steps and pictures, to try things out"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of parameters and of the order of the data (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: the same command goes on from there."""
    demo = DEMOS[args.memory]
    workdir = Path(args.workdir or demo.folder)
    if jax.config.jax_compilation_cache_dir is None:  # its runs, and those of --compare, share most of their programs
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    try:
        summary = demo.run(workdir, demo.recipe.scaled(args.steps_scale, args.seed), args.compare)
    except Interrupted:
        return 0
    print(demo.closing_words(summary, workdir))
    return 0
