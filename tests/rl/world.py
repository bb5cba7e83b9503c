"""A small world to reinforce in: that of tests.train, with prompts in place of conversations."""

import contextlib
import json
import signal

import pytest

from tests.train import world
from vlmem_jax.checkpoint import Store
from vlmem_jax.generate.engine import Engine
from vlmem_jax.models import VLM
from vlmem_jax.rl import GRPO
from vlmem_jax.train import run as runs
from vlmem_jax.train.goodput import Goodput
from vlmem_jax.train.loop import fit

OWN = "tests.rl.own:letters_b"


def make(folder):
    """Writes what `tests.train.world` writes, 8 prompts of no, one or two images and 2 held out."""
    world.make(folder)
    lines = []
    for n in range(10):
        images = [f"{n}.png", f"{n + 1}.png"][: n % 3]
        lines.append(json.dumps({"id": n, "prompt": "Say b" + "b" * n, "images": images, "answer": "b"}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines[:8]))
    (folder / "held_out.jsonl").write_text("".join(lines[8:]))
    return folder


def config(folder, rl=(), **changes):
    """One stage of 4 steps on 2 prompts of 4 answers each. `rl` are keys of its task, `changes` of the experiment."""
    settings = dict(rewards=[dict(name=OWN)], prompts=2, group_size=4, max_new_tokens=6, rollout_rows=8, kl=0.01)
    stage = dict(name="rl", steps=4, learning_rate=1e-2, task={"kind": "grpo", **settings, **dict(rl)})
    data = dict(
        train=[dict(path=str(folder / "prompts.jsonl"))],
        eval=[dict(path=str(folder / "held_out.jsonl"))],
        rows=8, pack_tokens=128, pack_tiles=6, threads=1,
    )  # fmt: skip
    return world.config(folder, **{"stages": [stage], "data": data, "mesh": dict(data=1, fsdp=-1), **changes})


def train(settings, workdir, mesh, until=None, tokens=0, task=GRPO):
    """Fits the first stage, from seed or where it was; gives the task. `until`: the step in which a Ctrl-C comes,
    before its rollouts or after so many tokens of them."""
    stage, keep = settings.stages[0], settings.checkpoint
    workdir.mkdir(exist_ok=True)
    task = task(settings, stage, VLM(settings.model), mesh, workdir)
    if until is not None:
        work = task.work

        def interrupting(step, params):
            if step != until:
                return work(step, params)
            if not tokens:
                signal.raise_signal(signal.SIGINT)
                return work(step, params)
            with interrupted_after(tokens):
                return work(step, params)

        task.work = interrupting
    store, clock = Store(workdir / stage.name, keep.keep_last, keep.keep_best), Goodput()
    start, _ = runs.origin(settings, stage, task.model, workdir)
    try:
        fit(task, settings, stage, mesh, store, workdir, start, clock)
    finally:
        store.close()
        clock.close()
    return task


@contextlib.contextmanager
def interrupted_after(tokens):
    """A Ctrl-C comes when engines have gone on by so many tokens less one; no more than that one may be drawn."""
    step, drawn = Engine.step, []

    def counting(engine):
        drawn.append(engine)
        if len(drawn) == tokens:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", counting)
        try:
            yield
        finally:
            assert len(drawn) == tokens


def numbers(workdir):
    """The records of steps, but for times."""
    return [line for line in world.records(workdir) if "loss" in line]
