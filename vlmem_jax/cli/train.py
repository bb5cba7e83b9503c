"""Train a model through the stages of an experiment. A run that was stopped goes on where it was."""

import argparse
import contextlib

from vlmem_jax import rl
from vlmem_jax.cli.flags import add_config
from vlmem_jax.config import ConfigError, override
from vlmem_jax.runtime import cluster
from vlmem_jax.train.config import experiment
from vlmem_jax.train.run import TASKS
from vlmem_jax.train.run import run as train

EXAMPLE = """vlmem train --config configs/tiny/comemo.py --workdir /tmp/run --config.stages.pretrain.steps=100
  vlmem train --config configs/comemo_2b.py --workdir RUN --profile 10:13
  vlmem train --config configs/comemo_9b.py --workdir gs://bucket/run --multihost     # on every host of a TPU pod
  vlmem train --config configs/comemo_9b.py --workdir /nfs/run \\
      --coordinator 10.0.0.1:8476 --processes 2 --process 0                              # and --process 1 elsewhere"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `vlmem train`."""
    add_config(parser)
    parser.add_argument("--workdir", required=True, help="folder of checkpoints and metrics; made if it is not there")
    parser.add_argument("--stage", help="train this stage alone; the one before it must be done")
    parser.add_argument(
        "--profile", metavar="FIRST:END", help="trace these steps of each stage into WORKDIR/profile; 10:13 is 3 steps"
    )
    group = parser.add_argument_group("several processes", "each runs this command, on a workdir that all share")
    group.add_argument("--multihost", action="store_true", help="find the others: TPU pod, SLURM, Open MPI, Kubernetes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, on any other cluster")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are; with --coordinator")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0; with --coordinator")
    group.add_argument(
        "--cluster-timeout",
        type=int,
        metavar="SECONDS",
        default=cluster.TIMEOUT,
        help="how long to wait for the others at the start (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """0 when done, and also when stopped by Ctrl-C or SIGTERM: then everything is saved."""
    settings = experiment(override(args.experiment, _profile(args.profile)) if args.profile else args.experiment)
    with _processes(args):
        train(settings, args.workdir, args.stage, TASKS | rl.TASKS)
    return 0


def _processes(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    if args.coordinator is None and (args.processes is not None or args.process is not None):
        raise ConfigError("--processes and --process need --coordinator HOST:PORT, the address of process 0")
    if args.coordinator is None and not args.multihost:
        return contextlib.nullcontext()
    return cluster.joined(args.coordinator, args.processes, args.process, args.cluster_timeout)


def _profile(steps: str) -> dict[str, int]:
    """The config keys of FIRST:END."""
    first, _, end = steps.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
        raise ConfigError(f"--profile must be FIRST:END, steps counted from 1, such as 10:13; got {steps!r}")
    return {"profile.first_step": int(first), "profile.steps": int(end) - int(first)}
