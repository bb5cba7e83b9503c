"""What learning from rewards takes on a CPU: a phase of rollouts, and the parts of a whole step of GRPO."""

import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.cpu_engine import prompt, together
from benchmarks.cpu_models import start, stepping
from benchmarks.measure import Row, in_turns, packed_batch
from benchmarks.models import make, wide
from vlmem_jax.demo.tokenizer import write_tokenizer
from vlmem_jax.evals.measure import compilations
from vlmem_jax.generate import Engine, Generator, Request, SamplingConfig
from vlmem_jax.processing import Tokenizer
from vlmem_jax.rl import GRPO
from vlmem_jax.rl.rollout import rollout_keys
from vlmem_jax.rl.rollout import rollouts as drawn
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.train.config import experiment
from vlmem_jax.train.run import run


def rollouts(group=8, count=16, slots=32, tokens=256, new=96, ends=4, layers=4, width=256, runs=5) -> list[Row]:
    """A phase of rollouts against the least work: each prompt read once, and a token for each slot at every step."""
    vlm, params = make(wide(layers, width, memory=None))
    generator = Generator(vlm, params, stop_ids=range(ends))
    prompts = [prompt(vlm, tokens, 0, n) for n in range(count)]
    sampling, keys_PG = SamplingConfig(new, temperature=1.0), rollout_keys(0, 0, 0, count, group)

    def phase() -> list[int]:
        found = drawn(generator, prompts, sampling, keys_PG, slots)
        return [len(step.tokens_T) for _, steps in found for step in steps]

    lengths, shape = phase(), PoolShape.of(slots, tokens + new, 0)
    reader, least = Engine(generator, shape), -(-sum(lengths) // slots)
    bare, programs, rows = start(vlm, params, packed_batch(vlm, slots, tokens, 0), shape.capacity)
    step = stepping(bare, programs, tokens + new)

    def work() -> jax.Array:
        nonlocal rows
        together(reader, [Request(one, SamplingConfig(1)) for one in prompts])
        for _ in range(least):
            rows = step(rows)
        return rows.logits_BV

    jax.block_until_ready(work())
    seconds = in_turns(phase, work, runs=runs)
    what = f"{count * group} rollouts of up to {new} tokens in {slots} slots, prompts of {tokens}"
    how = f"{np.mean(lengths):.3g} tokens an answer, {least} steps if no slot were ever empty"
    ratio = list(seconds[:, 0] / seconds[:, 1])
    return [Row(f"{what}: time / prompts read and tokens in full slots", ratio, None, True, "x", how)]


class Timed(GRPO):
    """GRPO whose steps come apart: the next begins when the parameters of the one before are there."""

    seen: list[str]
    spent: list[tuple[float, float, float, int]]
    """Seconds of rollouts, of rows with their reference, and of the update before, and programs compiled so far."""
    _left = 0.0

    def work(self, step, params):
        jax.block_until_ready(params)
        began = time.perf_counter()
        made = super().work(step, params)
        jax.block_until_ready(made.batch)
        now, drawing = time.perf_counter(), made.numbers["rollout/seconds"]
        self.spent.append((drawing, now - began - drawing, began - (self._left or began), len(self.seen)))
        self._left = now
        return made


def spread(output: str, prompt: object) -> float:
    """A reward that differs within groups."""
    return float(sum(map(ord, output)) % 7)


def grpo_step(prompts=4, group=8, question=60, new=48, layers=4, width=256, steps=24) -> list[Row]:
    """The parts of a step of GRPO, a phase of rollouts and one update, that compiles nothing."""
    with tempfile.TemporaryDirectory() as name, compilations() as seen:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        lines = [{"prompt": " ".join(f"row {(n + word) % 8 + 1}" for word in range(question)), "answer": "1"}
                 for n in range(4 * prompts)]  # fmt: skip
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        task = dict(
            kind="grpo", prompts=prompts, group_size=group, max_new_tokens=new, kl=0.01, drop_zero_variance=False,
            rollout_rows=prompts * group, rewards=[dict(name="benchmarks.cpu_rl:spread")],
        )  # fmt: skip
        model, tokenizer = wide(layers, width, memory=None), Tokenizer.load(folder / "tokenizer")
        model["decoder"]["vocab"] = tokenizer.vocab_size
        settings = {
            "model": model,
            "tokenizer": str(folder / "tokenizer"),
            "data": {
                "train": [{"path": str(folder / "prompts.jsonl")}],
                "pack_tokens": 4 * (question + new), "pack_tiles": 1, "rows": 4,
            },
            "stages": [{"name": "rl", "steps": steps, "learning_rate": 1e-4, "task": task}],
            "checkpoint": {"every": steps, "keep_best": 0},
            "mesh": {"data": 1, "fsdp": 1},
        }  # fmt: skip
        Timed.seen, Timed.spent = seen, []
        run(experiment(settings), folder / "run", tasks={"grpo": Timed}, say=lambda line: None)
    spent = np.array(Timed.spent)
    whole_N3 = np.stack([spent[:-1, 0], spent[:-1, 1], spent[1:, 2]], axis=1)
    calm_N = np.diff(spent[:, 3]) == 0
    calm_N[1:] &= calm_N[:-1]  # the rollouts of a step compile before its mark
    chosen_N3 = whole_N3[calm_N] if calm_N.any() else whole_N3[1:]
    totals_N = chosen_N3.sum(axis=1)
    what = f"a step of GRPO, {prompts} prompts of {question} tokens, {group} answers of up to {new} to each"
    how = f"{len(chosen_N3)} of {steps - 1} steps, in which nothing was compiled"
    rows = [Row(f"{what}, KL against the start", totals_N.tolist(), None, True, "s", how)]
    names = "rollouts", "rows and reference", "update"
    for name, part_N in zip(names, chosen_N3.T, strict=True):
        rows.append(Row(f"{name} of it", (100 * part_N / totals_N).tolist(), None, True, "%", how))
    return rows
