"""Train a small model with memory on mosaics of handwritten digits and write report.html: minutes on two CPU cores.

`comemo`: many images and high resolution. `vismem`: answers in several steps, learned from examples and then by reward.
"""

import argparse
from pathlib import Path

import jax

from vlmem_jax.demo import run as comemo
from vlmem_jax.demo import vismem
from vlmem_jax.demo.config import Recipe
from vlmem_jax.demo.job import Interrupted

DEMOS = {"comemo": (comemo, Recipe, "runs/demo"), "vismem": (vismem, vismem.VisMemRecipe, "runs/demo_vismem")}
"""--memory -> module, recipe, default folder."""
EXAMPLE = """vlmem demo --workdir runs/demo --compare
  vlmem demo --memory vismem"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem demo`."""
    parser.add_argument("--memory", choices=tuple(DEMOS), default="comemo", help="which demo (default: %(default)s)")
    folders = ", ".join(f"{folder} for {memory}" for memory, (_, _, folder) in DEMOS.items())
    parser.add_argument("--workdir", help=f"folder of everything it makes (default: {folders})")
    parser.add_argument(
        "--compare",
        action="store_true",
        help="the full table: of comemo, also train without memory and with other positions, in as many steps; of "
        "vismem, also answer with more ways to call for memories",
    )
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, metavar="X", help="times all steps and pictures, to try things out"
    )


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: the same command goes on from there."""
    demo, recipe, folder = DEMOS[args.memory]
    workdir = Path(args.workdir or folder)
    if jax.config.jax_compilation_cache_dir is None:  # its runs, and those of --compare, share most of their programs
        jax.config.update("jax_compilation_cache_dir", str((workdir / "compiled").absolute()))
    try:
        summary = demo.run_demo(workdir, recipe.scaled(args.steps_scale), args.compare)
    except Interrupted:
        return 0
    print(demo.closing_words(summary, workdir))
    return 0
