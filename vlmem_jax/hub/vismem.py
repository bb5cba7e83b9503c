"""VisMem in a checkpoint: nobody has published one, so tensors and `vismem_config` of config.json are named as here."""

from collections.abc import Mapping
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.hub.rules import Rule
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.trees import flatten

KEY = "vismem_config"


def rules(config: ModelConfig, layer: str) -> list[Rule]:
    """The memory's part of a name table: a tensor a leaf, layers stacked. None stand in the decoder's `layer`."""
    found = []
    for path, leaf in flatten(VLM(config).abstract()["memory"]).items():
        axes = "abcde"[: len(leaf.shape)]
        pattern, sizes = " ".join(axes), dict(zip(axes, leaf.shape, strict=True))
        found.append(Rule(f"memory/{path}", (f"vismem.{path.replace('/', '.')}",), f"{pattern} -> {pattern}", sizes))
    return found


def read(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Our keys; None for a checkpoint without this memory."""
    return content.get(KEY)


def write(model: ModelConfig) -> dict[str, Any]:
    """What config.json tells of a model with this memory."""
    return {KEY: to_dict(model.vismem)}
