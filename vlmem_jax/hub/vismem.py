"""VisMem in a checkpoint: nobody has published one, so tensors and `vismem_config` of config.json are named as here."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.hub.rules import Rule, flat
from vlmem_jax.models import VLM, ModelConfig

KEY = "vismem_config"


def rules(config: ModelConfig) -> list[Rule]:
    """The memory's part of a name table: a tensor a leaf, layers stacked."""
    found = []
    for path, leaf in flat(VLM(config).abstract()["memory"]).items():
        axes = "abcde"[: len(leaf.shape)]
        pattern, sizes = " ".join(axes), dict(zip(axes, leaf.shape, strict=True))
        found.append(Rule(f"memory/{path}", (f"vismem.{path.replace('/', '.')}",), f"{pattern} -> {pattern}", sizes))
    return found


def read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the model that config.json tells."""
    return {"memory": "vismem", "vismem": content[KEY]} if KEY in content else {}


def write(model: ModelConfig) -> dict[str, Any]:
    """What config.json tells of a model."""
    return {KEY: to_dict(model.vismem)} if model.memory == "vismem" else {}
