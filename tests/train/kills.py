"""Kills a run again and again at random moments: no step may be lost, and losses stay those of a run in one piece.

The suite does it 3 times; more by

    python -m tests.train.kills --count 30
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train import world

STEPS, EVERY = 24, 3
LONGEST = 1.5
"""Seconds after its first new step in which a run is killed; within them are steps, saves and evaluations."""


def child(folder: str, workdir: str) -> None:
    """One attempt: trains until it is done or killed."""
    from vlmem_jax.train.config import experiment
    from vlmem_jax.train.run import run

    stage = dict(name="only", steps=STEPS, learning_rate=1e-2)
    checkpoint = dict(every=EVERY, keep_last=2, keep_best=1)
    settings = dict(stages=[stage], checkpoint=checkpoint, eval_every=EVERY, log_every=1)
    assert run(experiment(world.config(Path(folder), **settings)), workdir)


def start(folder: Path, workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.train.kills", "--child", str(folder), str(workdir)]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flags} | cache
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def records(workdir: Path) -> dict[int, float]:
    """The loss of each step so far; a line that was being written is left out."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if "loss" in record:
                    found[record["step"]] = record["loss"]
    return found


def saved(workdir: Path) -> int:
    """The newest step that is saved."""
    return max((int(path.name) for path in (workdir / "only").glob("*") if path.name.isdigit()), default=0)


def finish(run: subprocess.Popen) -> None:
    _, error = run.communicate(timeout=600)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}:\n{error[-3000:]}")


def kill(folder: Path, workdir: Path, chance: random.Random) -> None:
    """Starts the run and kills it at a random moment after its first new step."""
    run, before = start(folder, workdir), records(workdir)
    while run.poll() is None and records(workdir).keys() <= before.keys():
        time.sleep(0.01)
    time.sleep(chance.uniform(0, LONGEST))
    run.send_signal(signal.SIGKILL)
    run.wait()
    done, step = max(records(workdir), default=0), saved(workdir)
    if done - step > 2 * EVERY:  # one save may be on its way while the next steps are done
        raise SystemExit(f"killed after step {done}, and no later step than {step} is saved")
    print(f"killed after step {done}; step {step} is saved", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WORKDIR"))
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder, chance = world.make(Path(name) / "world"), random.Random(args.seed)
        whole = Path(name) / "whole"
        finish(start(folder, whole))
        wanted, left, number = records(whole), args.count, 0
        while left:
            workdir, number = Path(name) / f"run{number}", number + 1
            while left and max(records(workdir), default=0) < STEPS // 2:
                kill(folder, workdir, chance)
                left -= 1
            finish(start(folder, workdir))
            if records(workdir) != wanted:
                raise SystemExit(f"the losses of {workdir.name} are not those of a run in one piece")
    print(f"killed {args.count} times: no step lost, the same losses")
    return 0


if __name__ == "__main__":
    sys.exit(main())
