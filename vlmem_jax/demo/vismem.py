"""VisMem's demo: a small Qwen2.5-VL learns to answer in steps, then when to remember what is learned by reward alone.

The base stands for the public model that VisMem starts from, and is handed over as such: in the Hugging Face layout,
without memory. After a supervised warm-up of what forms memories, stage I trains it by reward, and stage II when to
call for which (arXiv 2511.11007).
"""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from vlmem_jax.config import to_dict
from vlmem_jax.data import SourceConfig
from vlmem_jax.demo import vismem_report
from vlmem_jax.demo.config import TRIAL, common, conversations, stage
from vlmem_jax.demo.job import Say, Workdir
from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.pictures import records
from vlmem_jax.demo.steps import CELLS, MEMORY, PAUSE, StepsConfig, token_ids, write_steps
from vlmem_jax.evals import EvalConfig, evaluate
from vlmem_jax.generate import InvocationConfig, LoadedModel, SamplingConfig, load_model

BASE_STEPS = {"read": 400, "answer": 500}
"""Learning to read, then to answer in steps."""
VISMEM_STEPS = {"warmup": 60, "formation": 40, "invocation": 40}
BUDGET_STEPS = {"plain": 200, "warmup": 300}
"""With one visual token of a picture in the sequence: the base alone, then VisMem on that."""
FORMING = ("memory/query_builder", "memory/short", "memory/long")
ADAM = {"name": "adamw", "weight_decay": 0.0}
MEMORY_KEYS = {
    "kind": "vismem",
    "token_ids": token_ids(*MEMORY),
    "start_id": token_ids(PAUSE)[0],
    "invoke_bias": 0.0,  # at first it calls for memories as often as it pauses
    "memory_output": "rescaled",  # as long as embeddings: to so small a model, more is noise
}
PROMPTS, FEW_PROMPTS = 8, 4
ANSWER_TOKENS = 24
"""Most that a model chooses; a right answer has 13, and pauses and calls for memories count."""
BUDGET = "pooled:3"
"""A budget of context: of the nine visual tokens of a picture, their mean alone stands in the sequence."""
BATCH = 100
"""Held-out questions answered together."""
RANDOM = InvocationConfig("delimiter_random", probability=0.25)
"""Who calls for memories in stage I."""
OFF = InvocationConfig("never")
AFTER_PROMPT = InvocationConfig("first", max_invocations=1)


class Row(NamedTuple):
    """A row of the table."""

    where: str
    """The folder of the model."""
    what: str
    calls: InvocationConfig
    """Who calls for memories."""
    context: str | None = None
    """Which visual tokens stand in the sequence; None: those that it was trained with."""


DEFAULT_ROWS = {
    "sft": Row("base", "base, no memory", OFF),
    "warmup": Row("vismem/warmup", "after the warm-up, called at random (25 %)", RANDOM),
    "formation": Row("vismem/formation", "after stage I, called at random (25 %)", RANDOM),
    "invocation": Row("vismem", "after stage II, called by the model", InvocationConfig()),
    "off": Row("vismem", "after stage II, memory off", OFF),
    "always": Row("vismem", "after stage II, always", InvocationConfig("always")),
}
COMPARED_ROWS = {
    "random_50": Row("vismem", "after stage II, at random, 50 %", dataclasses.replace(RANDOM, probability=0.5)),
    "random_75": Row("vismem", "after stage II, at random, 75 %", dataclasses.replace(RANDOM, probability=0.75)),
    "short_only": Row("vismem", "after stage II, short alone", InvocationConfig(disabled=("long",))),
    "long_only": Row("vismem", "after stage II, long alone", InvocationConfig(disabled=("short",))),
    "reversed": Row("vismem", "after stage II, kinds reversed", InvocationConfig(reverse_types=True)),
    "budget_base": Row("base", "one token of context: the base", OFF, BUDGET),
    "budget_plain": Row("budget/plain", "one token of context: a base trained on there, no memory", OFF),
    "budget_off": Row("budget/vismem", "one token of context: VisMem warmed up there on that, memory off", OFF),
    "budget_first": Row("budget/vismem", "one token of context: the same, called after the prompt", AFTER_PROMPT),
    "budget_learned": Row("budget/vismem", "one token of context: the same, called by the model", InvocationConfig()),
}
"""What `--compare` adds."""


@dataclasses.dataclass(frozen=True)
class VisMemRecipe:
    """How long to train, and on how much data."""

    base: dict[str, int]
    vismem: dict[str, int]
    budget: dict[str, int]
    dataset: StepsConfig
    prompts: int
    """Prompts of a step of reinforcement, and answers drawn to each; other steps have multiples of it."""
    seed: int = 0
    """The seed of parameters and of the order of the data."""

    @classmethod
    def scaled(cls, scale: float = 1.0, seed: int = 0) -> "VisMemRecipe":
        """All steps and pictures times `scale`, to try things out; prompts are fewer below TRIAL.

        Raises ValueError if it is not positive.
        """
        if not scale > 0:
            raise ValueError(f"--steps-scale must be positive, got {scale}")

        def times(count: int, least: int = 1) -> int:
            return max(least, round(count * scale))

        sizes = StepsConfig()
        dataset = dataclasses.replace(
            sizes,
            pictures=times(sizes.pictures, 16),
            reading_lines=times(sizes.reading_lines, 64),
            steps_lines=times(sizes.steps_lines, 64),
            worked=times(sizes.worked, 32),
            prompts=times(sizes.prompts, 32),
            heldout=min(sizes.heldout, times(sizes.heldout, 24)),
        )
        steps = ({name: times(n) for name, n in steps.items()} for steps in (BASE_STEPS, VISMEM_STEPS, BUDGET_STEPS))
        return cls(*steps, dataset, FEW_PROMPTS if scale < TRIAL else PROMPTS, seed)


def base_experiment(dataset: Path, recipe: VisMemRecipe) -> ConfigDict:
    """Without memory: `read` the digits, then `answer` in steps."""
    steps = recipe.base
    stages = [
        stage("read", steps["read"], 5e-3, final_fraction=0.2, data=_talks(dataset, "reading", recipe)),
        stage("answer", steps["answer"], 4e-3),
    ]
    return _experiment(dataset, None, stages, _talks(dataset, "steps", recipe), seed=recipe.seed)


def _talks(dataset: Path, name: str, recipe: VisMemRecipe) -> dict[str, Any]:
    """Keys of data: conversations about a picture each."""
    return conversations(dataset, name, recipe.dataset.tokens, CELLS**2, 2 * recipe.prompts)


def plain_at_budget(dataset: Path, recipe: VisMemRecipe, init: Path) -> ConfigDict:
    """A base that goes on to learn to answer, with one visual token of a picture."""
    stages = [stage("answer", recipe.budget["plain"], 2e-3)]
    config = _experiment(dataset, None, stages, _talks(dataset, "steps", recipe), seed=recipe.seed, init=init)
    config.image.context = BUDGET
    return config


def vismem_at_budget(dataset: Path, recipe: VisMemRecipe, init: Path) -> ConfigDict:
    """A warm-up of VisMem on that: memories are formed from all visual tokens, which do not stand in the sequence.

    States are scaled, and positions start large, so that a query builder can tell visual tokens apart; small encoders
    with all their matrices form memories, by Muon.
    """
    memory = {"former": "tiny_transformer", "visual_states": "all", "normed_states": True, "position_std": 0.5}
    memory |= {"query_len": CELLS, "short_len": CELLS, "query_builder": {"layers": 2, "heads": 4, "ff_mult": 2}}
    warmup = _warmup(dataset, recipe, recipe.budget["warmup"], 4e-3, None, disabled=("long",))
    config = _experiment(dataset, MEMORY_KEYS | memory, [warmup], warmup["data"], seed=recipe.seed + 1, init=init)
    config.image.context = BUDGET
    return config


def vismem_experiment(dataset: Path, recipe: VisMemRecipe, init: Path) -> ConfigDict:
    """A warm-up and the two stages of VisMem (sec. 4) on a base, whose own parameters stay as they are."""
    N = recipe.prompts
    rollouts = {"prompts": N, "group_size": N, "rollout_rows": N * N, "max_new_tokens": ANSWER_TOKENS}
    rollouts["drop_zero_variance"] = False  # groups that tie are held to the reference, too
    random = to_dict(dataclasses.replace(RANDOM, anywhere=0.02))
    stages = [
        _warmup(dataset, recipe, recipe.vismem["warmup"], 6e-3, ADAM),
        stage(
            "formation",
            recipe.vismem["formation"],
            3e-4,
            trainable=FORMING,
            optimizer=ADAM,
            task={"kind": "grpo", **rollouts, "invocation": random, "kl": 0.015},
        ),
        stage(
            "invocation",
            recipe.vismem["invocation"],
            1e-2,
            trainable=("memory/special_", "memory/invoke_logit_bias"),
            optimizer=ADAM,
            task={"kind": "grpo", **rollouts, "invocation_penalty": 0.3, "kl": 0.03},
        ),
    ]
    data = conversations(dataset, "prompts", 256, 2 * CELLS**2, 2 * N)  # a prompt and its answers fill about one
    config = _experiment(dataset, MEMORY_KEYS, stages, data, seed=recipe.seed + 1, init=init, log_every=1)
    config.checkpoint.content = "trained"
    return config


def _warmup(
    dataset: Path, recipe: VisMemRecipe, steps: int, rate: float, optimizer: dict[str, Any] | None, **task: Any
) -> dict[str, Any]:
    """A stage in which what forms memories learns from answers with their steps; other keys of its task."""
    N = recipe.prompts
    return stage(
        "warmup",
        steps,
        rate,
        data=conversations(dataset, "worked", 128, 4 * CELLS**2, 2 * N),
        task={"kind": "memory_sft", "prompts": 4 * N, "rollout_rows": 4 * N, "row_memories": 2, **task},
        trainable=FORMING,
        optimizer=optimizer,
    )


def _experiment(
    dataset: Path,
    memory: dict[str, Any] | None,
    stages: Sequence[dict[str, Any]],
    data: dict[str, Any],
    seed: int,
    init: Path | None = None,
    **more: Any,
) -> ConfigDict:
    return ConfigDict(
        common(dataset, stages, seed, init)
        | {
            "model": {"preset": "digits_qwen2_5_vl", "memory": memory},
            "image": {"min_pixels": 256, "max_pixels": 4096},
            "data": data,
            "eval_every": 10_000,
            **more,
        }
    )


class VisMemDemo(Workdir):
    """The workdir of VisMem's demo."""

    def score(self, name: str, model: LoadedModel, invocation: InvocationConfig) -> dict[str, Any]:
        """Answers the held-out questions as `vlmem evaluate` does, into scores/NAME."""
        source = SourceConfig(str(self.dataset / "heldout.jsonl"))
        sampling = SamplingConfig(max_new_tokens=ANSWER_TOKENS)
        config = EvalConfig((source,), sampling=sampling, invocation=invocation, batch_size=BATCH)
        with self.timed("questions"):
            return evaluate(model, config, self.workdir / "scores" / name)


def run_demo(workdir: Path, recipe: VisMemRecipe, comparing: bool = False, say: Say = print) -> dict[str, Any]:
    """The whole demo; gives what it writes to summary.json. Raises Interrupted where training was stopped."""
    start = time.perf_counter()
    demo = VisMemDemo(workdir, say)
    say("1/5 Making pictures of handwritten digits, questions that take several steps, and a tokenizer")
    demo.make_dataset(recipe.dataset, write_steps)
    say("2/5 Training a base without memory to answer in steps; it stands for a public model")
    base = demo.train("base", base_experiment(demo.dataset, recipe))
    say("3/5 Training VisMem on it, in the paper's two stages, from rewards alone")
    folder = demo.train("vismem", vismem_experiment(demo.dataset, recipe, demo.hand_over(base)))
    if comparing:
        plain = demo.train("budget/plain", plain_at_budget(demo.dataset, recipe, demo.hand_over(base)))
        demo.train("budget/vismem", vismem_at_budget(demo.dataset, recipe, demo.hand_over(plain)))
    say("4/5 Asking about digits that training has never seen")
    scores, models = {}, {}
    for name, row in (DEFAULT_ROWS | (COMPARED_ROWS if comparing else {})).items():
        asked = row.where, row.context
        if asked not in models:
            models[asked] = load_model(demo.workdir / row.where, context=row.context)
        scores[name] = {"what": row.what, **demo.score(name, models[asked], row.calls)}
        say(f"{row.what}: {scores[name]['accuracy']:.1%}")
    say("5/5 Writing the report")
    train, heldout = load_digits()
    lines, marks = records([folder])
    steps = {**recipe.base, **recipe.vismem}
    summary = {
        "vismem": {
            "accuracy": {name: score["accuracy"] for name, score in scores.items()},
            "rewards": [{"step": step, **_rewards(line)} for step, line in lines if "score/mean" in line],
            "stages": marks,
            "scores": scores,
            "parameters": {where: _parameters(model) for (where, _), model in models.items()},
        },
        "dataset": {
            "train_digits": len(train.labels_N),
            "heldout_digits": len(heldout.labels_N),
            **to_dict(recipe.dataset),
        },
        "steps": {**steps, "total": sum(steps.values())},
    }
    summary["seconds"] = {**demo.seconds, "total": time.perf_counter() - start}
    answers = (demo.workdir / "scores" / "invocation" / "samples.jsonl").read_text().splitlines()
    asked = (demo.dataset / "heldout.jsonl").read_text().splitlines()
    chosen = vismem_report.examples(demo.dataset, list(map(json.loads, asked)), list(map(json.loads, answers)))
    demo.write("report.html", vismem_report.render(summary, chosen))
    demo.write("summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _rewards(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a step of RL records of its rollouts."""
    kinds = ("score/", "memory/", "penalty/", "rollout/zero_variance_groups", "rollout/seconds", "kl")
    return {key: value for key, value in line.items() if key.startswith(kinds) or key == "stage"}


def _parameters(model: LoadedModel) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(model.params))


def closing_words(summary: dict[str, Any], workdir: Path) -> str:
    """What to say at the end."""
    rows = summary["vismem"]["scores"].values()
    width = max(len(row["what"]) for row in rows)
    return "\n".join(
        [
            "",
            f"Right answers to {summary['dataset']['heldout']} held-out questions:",
            *(f"  {row['what'].ljust(width)}  {row['accuracy']:.1%}" for row in rows),
            "",
            f"{summary['seconds']['total'] / 60:.1f} minutes. Pictures and curves: {workdir / 'report.html'}, "
            f"every number: {workdir / 'summary.json'}",
        ]
    )
