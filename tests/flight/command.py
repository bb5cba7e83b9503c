"""Runs `vlmem compile` for tests, each command in a process of its own, which ends when the answer is there.

A server that has imported the command once forks them: that import takes longer than a small program.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from vlmem_jax.cli.main import main

ROOT = Path(__file__).parents[2]
SECONDS = 1500

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vlmem_jax.cli.compile"])


@dataclasses.dataclass(frozen=True)
class Done:
    """What one command said. `report` is empty where it wrote none."""

    code: int
    out: str
    err: str
    report: dict


def compile_step(folder: Path, *words: str, before: Callable[[], None] | None = None, **knobs) -> Done:
    """Runs `vlmem compile WORDS`, after `before()`, with the compiler's least effort. `knobs` are of JAX."""
    knobs = {"jax_exec_time_optimization_effort": -1.0, "jax_disable_most_optimizations": False} | knobs
    (done,) = compile_steps(folder, [words], before, **knobs)
    return done


def compile_steps(folder: Path, lines: list[tuple], before: Callable[[], None] | None = None, **knobs) -> list[Done]:
    """Runs several commands in one process."""
    child = SERVER.Process(target=_run, args=(folder, lines, before, knobs))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        raise TimeoutError(f"vlmem compile takes more than {SECONDS} s: {lines}")
    assert (folder / f"{len(lines) - 1}.code").exists(), f"the process ended with {child.exitcode}: {lines}"

    def read(n: int, kind: str) -> str:
        path = folder / f"{n}.{kind}"
        return path.read_text() if path.exists() else ""

    return [
        Done(int(read(n, "code")), read(n, "out"), read(n, "err"), json.loads(read(n, "json") or "{}"))
        for n in range(len(lines))
    ]


def _run(folder: Path, lines: list[tuple], before: Callable[[], None] | None, knobs: dict) -> None:
    import jax

    os.chdir(ROOT)
    for name, value in knobs.items():
        jax.config.update(name, value)
    if before:
        before()
    for n, words in enumerate(lines):
        with contextlib.ExitStack() as stack:
            for kind, redirect in (("out", contextlib.redirect_stdout), ("err", contextlib.redirect_stderr)):
                stack.enter_context(redirect(stack.enter_context(open(folder / f"{n}.{kind}", "w"))))
            code = main(["compile", *words, "--json", str(folder / f"{n}.json")])
        (folder / f"{n}.code").write_text(str(code))
    os._exit(0)  # a compiler that still writes machine code is left behind
