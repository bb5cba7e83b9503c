"""The same budget spent in other ways: without memory, with other positions, and with the memory switched off."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from vlmem_jax.demo.config import comemo_experiment, mix_experiment, plain_experiment
from vlmem_jax.demo.job import Demo, Trained
from vlmem_jax.generate import LoadedModel

OTHER_POSITIONS = {
    "code_ids": ("RoPE-DHR, id map of the released code", {"dhr_map": "code"}),
    "dhr_off": ("without RoPE-DHR", {"rope_dhr": False}),
}


def compare(demo: Demo, base: Path, comemo: Trained) -> dict[str, dict[str, Any]]:
    """name -> what it is, the steps it was trained for after the base, and its numbers. Raises Interrupted."""
    total, full = sum(demo.recipe.comemo.values()), demo.recipe.comemo["finetune"]
    rows: dict[str, dict[str, Any]] = {}

    def add(name: str, what: str, steps: int, trained: Trained) -> None:
        rows[name] = {"what": what, "steps": steps, **trained.numbers}
        accuracy = rows[name]["accuracy"]
        demo.say(f"{what}: one image {accuracy['single_image']:.1%}, several {accuracy['multi_image']:.1%}")

    def train(name: str, config: ConfigDict) -> Path:
        config.data.eval = []  # these runs draw no curves
        return demo.train(f"compare/{name}", config)

    def train_and_add(name: str, what: str, steps: int, config: ConfigDict) -> None:
        add(name, what, steps, demo.ask(train(name, config)))

    def plain(steps: int):
        return plain_experiment(demo.dataset, demo.recipe, base, steps)

    add("comemo", "CoMemo", total, comemo)
    add("gates_zero", "CoMemo, all gates set to zero", total, demo.ask(without_gates(comemo.model)))
    train_and_add("plain_equal_steps", "no memory, as many steps", total, plain(total))
    train_and_add("plain_equal_full_steps", "no memory, as many steps of all parameters", full, plain(full))
    add("base", "the base alone", 0, demo.ask(demo.workdir / "base"))
    read = demo.workdir / "base" / "read"
    for name, (what, image) in OTHER_POSITIONS.items():
        mixed = train(f"{name}_base", mix_experiment(demo.dataset, demo.recipe, read, **image))
        config = comemo_experiment(demo.dataset, demo.recipe, demo.hand_over(mixed), **image)
        train_and_add(name, f"CoMemo, {what}", total, config)
    return rows


def without_gates(model: LoadedModel) -> LoadedModel:
    """The same parameters, but nothing of what the memory computes is added."""
    blocks = dict(model.params["memory"]["blocks"])
    for gate in ("attn_gate", "mlp_gate"):
        blocks[gate] = jnp.zeros_like(blocks[gate])
    return dataclasses.replace(model, params={**model.params, "memory": {"blocks": blocks}})
