"""What the report shows besides numbers: curves of training, examples, and a look at attention."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmem_jax.demo import attention
from vlmem_jax.demo.comemo_report import Example, Looking, Map
from vlmem_jax.demo.evaluate import Answered
from vlmem_jax.demo.job import Trained
from vlmem_jax.demo.questions import opening
from vlmem_jax.generate import LoadedModel
from vlmem_jax.processing.images import open_image, tile_grid

Curve = list[tuple[int, float]]
WRONG_SHOWN = 2
"""Wrong answers among the examples, where there are any."""


def records(runs: Sequence[Path]) -> tuple[list[tuple[int, dict[str, Any]]], dict[str, int]]:
    """((step over all, line of metrics) ..., stage -> its first step) of runs that continue each other."""
    lines: list[tuple[int, dict[str, Any]]] = []
    marks: dict[str, int] = {}
    before = 0
    for run in runs:
        stages = {stage["name"]: stage["steps"] for stage in json.loads((run / "config.json").read_text())["stages"]}
        starts = {name: before + sum(list(stages.values())[:n]) for n, name in enumerate(stages)}
        marks |= starts
        before += sum(stages.values())
        for line in (run / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            lines.append((starts[record["stage"]] + record["step"], record))
    return lines, marks


def curves(runs: Sequence[Path]) -> tuple[dict[str, dict[str, Curve]], dict[str, int]]:
    """(chart -> curve -> points, stage -> its first step) of runs that continue each other."""
    loss: dict[str, Curve] = {"training": [], "held out": []}
    gates: dict[str, Curve] = {}
    lines, marks = records(runs)
    for step, record in lines:
        for key, name in (("loss", "training"), ("eval/loss", "held out")):
            if key in record:
                loss[name].append((step, record[key]))
        for key, value in record.items():
            if key.startswith("gate/"):
                _, kind, layer = key.split("/")
                gates.setdefault(f"{kind}, before layer {int(layer) + 1}", []).append((step, value))
    return {"loss": loss, "gates": gates}, marks


def examples(trained: Trained, dataset: Path) -> list[Example]:
    """A question of each kind, and some that were answered wrongly."""
    kinds: dict[tuple, Answered] = {}
    for one in trained.answered:
        images = len(one.asked.images)
        if one.asked.image == images // 2:
            kinds.setdefault((images, one.asked.grid), one)
    chosen = list(kinds.values())
    chosen += [one for one in trained.answered if not one.right and one not in chosen][:WRONG_SHOWN]
    return [
        Example(
            [open_image(dataset / path) for path in one.asked.images],
            (one.asked.image, one.asked.row, one.asked.column),
            one.asked.question,
            one.asked.answer,
            one.answer,
        )
        for one in chosen
    ]


def looking(model: LoadedModel, folder: Path, question: dict[str, Any]) -> Looking:
    """Where the last token of a question about one picture looks."""
    picture = open_image(folder / question["image"])
    sample = model.processor.prompt([*opening([picture]), question["question"]])
    weights = attention.last_token(model, sample)
    side = model.processor.tokens_per_side
    every = model.vlm.config.memory.every

    def maps(kind: str, weights_LHM: np.ndarray, layers: Sequence[int]) -> list[Map]:
        tiles_LIRC = weights_LHM.mean(axis=1).reshape(len(weights_LHM), -1, side, side)
        return [Map(f"{kind} {n + 1}", tiles_IRC) for n, tiles_IRC in zip(layers, tiles_LIRC, strict=True)]

    blocks = [n * every + every - 1 for n in range(len(weights.memory_LHM))]
    return Looking(
        question["question"],
        question["answer"],
        tile_grid(*picture.size, model.processor.tile.side, model.processor.image),
        [Image.fromarray(tile) for tile in sample.pixels_ISSc],
        maps("memory, before layer", weights.memory_LHM, blocks)
        + maps("context path, layer", weights.context_LHM, range(len(weights.context_LHM))),
    )
