"""The families of released checkpoints, by `model_type` of their config.json and by vision tower."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlmem_jax.checkpoint.folder import CONFIG_FILE
from vlmem_jax.hub import internvl, internvl_config, qwen2_5_vl, qwen2_5_vl_config
from vlmem_jax.hub.settings import Released
from vlmem_jax.hub.tokenizer_files import ADDED
from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import ImageConfig, PatchConfig
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.records import Rule


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family's tensors are named and what its JSON files say."""

    name_table: Callable[[ModelConfig, bool | None, int | None], list[Rule]]
    """`name_table(model, layout, vocab)`; see the modules."""
    layout: Callable[[Iterable[str]], bool]
    """Which of a family's two ways of naming the names of a checkpoint follow."""
    read_config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]], Mapping[str, Any]], Released]
    """`read_config(config.json, shapes of tensors, preprocessor_config.json)`."""
    write_files: Callable[..., dict[str, dict[str, Any]]]
    """`write_files(model, image, template, dtype, tokenizer)`: content of the JSON files, by name."""
    added_tokens: tuple[str, ...] = ()
    """What is added to the tokenizer of a language model that knows no images, in the order of ids."""


PREPROCESSOR_FILE = "preprocessor_config.json"


def _internvl_files(
    model: ModelConfig, image: ImageConfig, template: str, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    return {CONFIG_FILE: internvl_config.write_config(model, image, template, dtype)}


def _qwen_files(
    model: ModelConfig, image: PatchConfig, template: str, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, dict[str, Any]]:
    return {
        CONFIG_FILE: qwen2_5_vl_config.write_config(model, dtype, tokenizer),
        PREPROCESSOR_FILE: qwen2_5_vl_config.write_preprocessor(model, image),
    }


FAMILIES = {
    "internvl_chat": Family(
        internvl.name_table,
        internvl.is_wrapped,
        lambda content, shapes, preprocessor: internvl_config.read_config(content, shapes),
        _internvl_files,
        ADDED,
    ),
    "qwen2_5_vl": Family(qwen2_5_vl.name_table, qwen2_5_vl.is_nested, qwen2_5_vl_config.read_config, _qwen_files),
}
"""By `model_type`."""


def of_model(model: ModelConfig) -> Family:
    """The family that a model's tower belongs to."""
    return FAMILIES["qwen2_5_vl" if model.vision.kind == "qwen_vit" else "internvl_chat"]


def of_config(content: Mapping[str, Any]) -> Family:
    """The family of a parsed config.json. Raises ValueError with those there are."""
    kind = content.get("model_type", "internvl_chat")
    if kind not in FAMILIES:
        raise ValueError(f"model_type of config.json must be one of {', '.join(FAMILIES)}; got {kind!r}")
    return FAMILIES[kind]
