"""Train a model through the stages of an experiment. A run that was stopped goes on where it was."""

import argparse

from vlmem_jax.cli.flags import add_config
from vlmem_jax.train.config import experiment
from vlmem_jax.train.run import run as train

EXAMPLE = "vlmem train --config configs/tiny/comemo.py --workdir /tmp/run --config.stages.pretrain.steps=100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem train`."""
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints and metrics; made if it is not there")
    parser.add_argument("--stage", help="train this stage alone; the one before it must be done")


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: then everything is saved."""
    train(experiment(args.experiment), args.workdir, args.stage)
    return 0
