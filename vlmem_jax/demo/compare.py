"""A comparison with and without memory at several budgets of context, and of what else could make the difference."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmem_jax.demo.config import BUDGET, comemo_experiment, plain_experiment
from vlmem_jax.demo.job import Demo, Trained
from vlmem_jax.generate import LoadedModel

BUDGETS = {BUDGET: "the thumbnail", "pooled:2": "means of 2 x 2 tokens", "all": "all tiles"}
"""The budgets of context, and what stands in the sequence under each."""
TRAINED = tuple(BUDGETS)
"""The budgets that models are trained at, with memory and without."""
OTHER_STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "raster_ids": ("CoMemo, ids without the place in a cell", {"dhr_map": "raster"}),
    "trained_gates": ("CoMemo, gates that are trained, too", {"frozen": ()}),
    "published": (
        "CoMemo, blocks from random numbers and closed gates, ids of the released code",
        {"memory": {"kind": "comemo"}, "frozen": (), "dhr_map": "code"},
    ),
}
"""At the budget of the demo: name -> what it is, arguments of `comemo_experiment`."""


def compare(demo: Demo, base: Path, asked: Mapping[str, Trained]) -> dict[str, dict[str, Any]]:
    """name -> what it is, its context, the steps it was trained for after the base, and its numbers.

    `base` is the folder to start from, and `asked` has the rows of the demo itself. Raises Interrupted.
    """
    steps = demo.recipe.comemo_total
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, what: str, context: str, trained: Trained, steps: int = steps) -> None:
        rows[name] = {"what": what, "context": context, "steps": steps, **trained.numbers}
        accuracy = rows[name]["accuracy"]
        several = accuracy["multi_image"]
        demo.say(f"{what}, {BUDGETS[context]}: one image {accuracy['single_image']:.1%}, several {several:.1%}")

    def train_and_add(name: str, what: str, context: str, config: ConfigDict) -> None:
        config.data.eval = []  # these runs draw no curves
        add(name, what, context, demo.ask(demo.train(f"compare/{name}", config)))

    add("base", "the base", "all", asked["base"], 0)
    add("base_at_budget", "the base", BUDGET, asked["base_at_budget"], 0)
    add("base_pooled", "the base", "pooled:2", demo.ask(demo.workdir / "base", "pooled:2"), 0)
    comemo = asked["comemo"]
    add("comemo", "CoMemo", BUDGET, comemo)
    add("gates_zero", "CoMemo, all gates set to zero", BUDGET, demo.ask(without_gates(comemo.model)))
    add(
        "memory_of_thumbnails",
        "CoMemo, whose memory has the thumbnails alone",
        BUDGET,
        demo.ask(blinkered(comemo.model)),
    )
    for context in TRAINED:
        short = context.partition(":")[0]
        config = plain_experiment(demo.dataset, demo.recipe, base, context=context)
        train_and_add(f"plain_{short}", "no memory, as many steps", context, config)
        if context != BUDGET:
            config = comemo_experiment(demo.dataset, demo.recipe, base, context=context)
            train_and_add(f"comemo_{short}", "CoMemo", context, config)
    for name, (what, changes) in OTHER_STARTS.items():
        train_and_add(name, what, BUDGET, comemo_experiment(demo.dataset, demo.recipe, base, **changes))
    return rows


def without_gates(model: LoadedModel) -> LoadedModel:
    """The same parameters, but nothing of what the memory computes is added."""
    blocks = dict(model.params["memory"]["blocks"])
    for gate in ("attn_gate", "mlp_gate"):
        blocks[gate] = jnp.zeros_like(blocks[gate])
    return dataclasses.replace(model, params={**model.params, "memory": {"blocks": blocks}})


def blinkered(model: LoadedModel) -> LoadedModel:
    """A copy of the model that sees no more than stands in its sequence."""
    processor = model.processor
    read = type(processor)(
        processor.tokenizer,
        dataclasses.replace(processor.image, max_tiles=1),
        model.vlm.config.vision.geometry,
        processor.system,
    )
    return dataclasses.replace(model, processor=read)
