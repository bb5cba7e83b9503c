"""The demo's experiments: a base model trained from scratch, then CoMemo on top of it at a budget of context.

The base learns with all tiles in its sequence. It stands for what CoMemo starts from, a public vision tower and
language model, and is handed over as such: in the Hugging Face layout, without memory blocks. CoMemo then reads the
thumbnails alone in its sequence, and all tiles in its memory.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlmem_jax.demo.dataset import DatasetConfig

BASE_STEPS = {"read": 400, "mix": 1200}
"""Learning to read one tile, then all grids and several images."""
COMEMO_STEPS = {"finetune": 1900}
"""Everything but the gates, with memory blocks that start from the base's own attention."""
BUDGET = "thumbnail"
"""The context budget of CoMemo: the part of an image that stands in its sequence."""
MEMORY = {"kind": "comemo", "start": "attention", "gate": 1.0}
GATES = ("memory/blocks/.*_gate",)
"""Parameters that stay as they are: trained, open gates close again."""
ROWS, FEW_ROWS = 16, 8
AT_ONCE = 4
"""Rows that a device works on at a time: of so few tokens, more than one make better use of it."""
MOST_TILES = 5
"""Tiles of the largest picture, 2x2, and its thumbnail; no conversation shows more."""
TRIAL = 0.02
"""Below it, a demo shows that it runs, and no more: a step is small, too."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long to train, and on how much data."""

    base: dict[str, int]
    comemo: dict[str, int]
    dataset: DatasetConfig
    rows: int
    """Rows of a step."""
    seed: int = 0
    """Another one starts from other parameters, and sees the data in another order."""

    @classmethod
    def scaled(cls, scale: float = 1.0, seed: int = 0) -> "Recipe":
        """All steps and pictures times `scale`, to try things out; rows are fewer below TRIAL."""
        if not scale > 0:
            raise ValueError(f"--steps-scale must be positive, got {scale}")

        def times(count: int, least: int = 1) -> int:
            return max(least, round(count * scale))

        sizes = DatasetConfig()
        dataset = dataclasses.replace(
            sizes,
            reading_lines=times(sizes.reading_lines, 64),
            mixture_lines=times(sizes.mixture_lines, 64),
            budget_lines=times(sizes.budget_lines, 64),
            tiles=times(sizes.tiles, 16),
            larger=times(sizes.larger, 16),
            heldout_lines=min(sizes.heldout_lines, times(sizes.heldout_lines, 16)),
            questions_each=min(sizes.questions_each, times(sizes.questions_each, 4)),
        )
        steps = ({name: times(n) for name, n in steps.items()} for steps in (BASE_STEPS, COMEMO_STEPS))
        return cls(*steps, dataset, FEW_ROWS if scale < TRIAL else ROWS, seed)

    @property
    def comemo_total(self) -> int:
        return sum(self.comemo.values())


def base_experiment(dataset: Path, recipe: Recipe) -> ConfigDict:
    """Without memory: `read` one tile, then a `mix` of everything."""
    reading = _data(dataset, "reading", recipe.rows)
    read = stage("read", recipe.base["read"], 5e-3, final_fraction=0.2, data=reading)
    mix = stage("mix", recipe.base["mix"], 4e-3)
    return _experiment(dataset, recipe, None, [read, mix])


def comemo_experiment(
    dataset: Path,
    recipe: Recipe,
    init: Path,
    memory: Mapping[str, Any] = MEMORY,
    frozen: Sequence[str] = GATES,
    **image: Any,
) -> ConfigDict:
    """CoMemo on a base, in as many steps as `plain_experiment`; other keys of `image` than the demo's."""
    stages = [_finetune(recipe, frozen=frozen)]
    return _experiment(dataset, recipe, dict(memory), stages, init, **{"context": BUDGET, **image})


def plain_experiment(dataset: Path, recipe: Recipe, init: Path, **image: Any) -> ConfigDict:
    """The control: all of the base trained on, without memory."""
    return _experiment(dataset, recipe, None, [_finetune(recipe)], init, **{"context": BUDGET, **image})


def _finetune(recipe: Recipe, **more: Any) -> dict[str, Any]:
    return stage("finetune", recipe.comemo["finetune"], 4e-3, **more)


def _experiment(
    dataset: Path,
    recipe: Recipe,
    memory: dict[str, Any] | None,
    stages: Sequence[dict[str, Any]],
    init: Path | None = None,
    context: str = "all",
    **image: Any,
) -> ConfigDict:
    source = "budget" if context == BUDGET else "mixture"
    stages = [{"accumulation": max(ROWS // (AT_ONCE * jax.device_count()), 1), **one} for one in stages]
    return ConfigDict(
        common(dataset, stages, recipe.seed, init)
        | {
            "model": {"preset": "digits", "memory": memory},
            "image": {"dhr_map": "fine", "context": context, **image},
            "data": _data(dataset, source, recipe.rows),
            "eval_every": 100,
        }
    )


def common(dataset: Path, stages: Sequence[dict[str, Any]], seed: int, init: Path | None = None) -> dict[str, Any]:
    """Keys of an experiment of any of the demos; those of model, image and data are missing."""
    return {
        "seed": seed,
        "tokenizer": str(dataset / "tokenizer"),
        "system": "",
        "optimizer": {"name": "muon", "b2": 0.98, "weight_decay": 0.0, "muon_rms": 0.4},
        "mesh": {"data": -1, "fsdp": 1},
        "checkpoint": {"every": 10_000, "keep_last": 1, "keep_best": 0},
        "init": str(init) if init else None,
        "stages": list(stages),
        "log_every": 10,
    }


def stage(name: str, steps: int, learning_rate: float, **more: Any) -> dict[str, Any]:
    """A stage of any of the demos; `more` are keys of it."""
    schedule = {"schedule": "cosine", "final_fraction": 0.05, "warmup_fraction": 0.05}
    return {"name": name, "steps": steps, "learning_rate": learning_rate, **schedule, **more}


def _data(dataset: Path, source: str, rows: int) -> dict[str, Any]:
    """Keys of data that make each conversation of SOURCE.jsonl a row, and evaluate on held-out ones of the kind."""
    tokens = {name: getattr(DatasetConfig, f"{name}_tokens") for name in ("reading", "mixture", "budget")}
    heldout = {"mixture": "heldout", "budget": "heldout_budget"}.get(source)
    data = conversations(dataset, source, tokens[source], 1 if source == "reading" else MOST_TILES, rows)
    return data | {"eval": [{"path": str(dataset / f"{heldout}.jsonl")}] if heldout else []}


def conversations(dataset: Path, source: str, tokens: int, tiles: int, rows: int) -> dict[str, Any]:
    """Keys of data for any of the demos: conversations of SOURCE.jsonl, each as long as a row."""
    return {
        "train": [{"path": str(dataset / f"{source}.jsonl")}],
        "rows": rows,
        "pack_tokens": tokens,
        "pack_tiles": tiles,
        "open_packs": 1,  # a sample fills a row: nothing to gain by holding rows back
        "loss_weight": "token",
        "threads": 1,
        "plan_folder": str(dataset / "plans"),
    }
