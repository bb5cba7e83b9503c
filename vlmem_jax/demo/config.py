"""The demo's experiments: a base model trained from scratch, then CoMemo on top of it in the paper's three stages.

The base stands for what CoMemo starts from, a public vision tower and language model, and is handed over as such: in
the Hugging Face layout, without memory blocks.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vlmem_jax.demo.dataset import DatasetConfig

BASE_STEPS = {"read": 480, "mix": 480}
"""Learning to read one tile, then all grids and several images."""
COMEMO_STEPS = {"pretrain": 40, "pretrain_phase2": 30, "finetune": 140}
"""Projector and memory, the same with gates frozen, everything."""
ROWS, FEW_ROWS = 16, 8
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

    @classmethod
    def scaled(cls, scale: float = 1.0) -> "Recipe":
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
            tiles=times(sizes.tiles, 16),
            larger=times(sizes.larger, 16),
            heldout_lines=min(sizes.heldout_lines, times(sizes.heldout_lines, 16)),
            questions_each=min(sizes.questions_each, times(sizes.questions_each, 4)),
        )
        steps = ({name: times(n) for name, n in steps.items()} for steps in (BASE_STEPS, COMEMO_STEPS))
        return cls(*steps, dataset, rows=FEW_ROWS if scale < TRIAL else ROWS)

    @property
    def comemo_total(self) -> int:
        return sum(self.comemo.values())


def base_experiment(dataset: Path, recipe: Recipe) -> ConfigDict:
    """Without memory: `read` one tile, then a `mix` of everything."""
    reading = _data(dataset, "reading", 1, recipe.rows)
    read = stage("read", recipe.base["read"], 5e-3, final_fraction=0.2, data=reading)
    return _experiment(dataset, recipe, "none", [read, _mix(recipe)], seed=0)


def mix_experiment(dataset: Path, recipe: Recipe, init: Path, **image: Any) -> ConfigDict:
    """The second stage of the base alone, from the end of the first, with other keys of `image`."""
    return _experiment(dataset, recipe, "none", [_mix(recipe)], seed=0, init=init, **image)


def comemo_experiment(dataset: Path, recipe: Recipe, init: Path, **image: Any) -> ConfigDict:
    """The three stages of CoMemo (sec. 4) on a base."""
    new = {"trainable": ["projector/", "memory/"], "schedule": "constant"}
    steps = recipe.comemo
    stages = [
        stage("pretrain", steps["pretrain"], 3e-3, **new),
        stage("pretrain_phase2", steps["pretrain_phase2"], 3e-3, **new, frozen=["memory/blocks/(attn|mlp)_gate"]),
        stage("finetune", steps["finetune"], 3e-3),
    ]
    return _experiment(dataset, recipe, "comemo", stages, seed=1, init=init, **image)


def plain_experiment(dataset: Path, recipe: Recipe, init: Path, steps: int) -> ConfigDict:
    """The control: all of the base trained on, without memory."""
    return _experiment(dataset, recipe, "none", [stage("finetune", steps, 3e-3)], seed=1, init=init)


def _mix(recipe: Recipe) -> dict[str, Any]:
    return stage("mix", recipe.base["mix"], 4e-3)


def _experiment(
    dataset: Path,
    recipe: Recipe,
    memory: str,
    stages: Sequence[dict[str, Any]],
    seed: int,
    init: Path | None = None,
    **image: Any,
) -> ConfigDict:
    return ConfigDict(
        common(dataset, stages, seed, init)
        | {
            "model": {"preset": "digits", "memory": memory},
            "image": {"dhr_map": "raster", **image},
            "data": _data(dataset, "mixture", 5, recipe.rows),
            "eval_every": 100,
        }
    )


def common(dataset: Path, stages: Sequence[dict[str, Any]], seed: int, init: Path | None = None) -> dict[str, Any]:
    """Keys of an experiment of any of the demos; those of model, image and data are missing."""
    return {
        "seed": seed,  # another one sees the data in another order
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


def _data(dataset: Path, source: str, tiles: int, rows: int) -> dict[str, Any]:
    longest = DatasetConfig.reading_tokens if source == "reading" else DatasetConfig.mixture_tokens
    heldout = [{"path": str(dataset / "heldout.jsonl")}] if source == "mixture" else []
    return conversations(dataset, source, longest, tiles, rows) | {"eval": heldout}


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
