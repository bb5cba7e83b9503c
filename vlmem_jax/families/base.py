"""What a family of backbones is to the hub, and what a memory has in its checkpoints."""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from vlmem_jax.config import to_dict
from vlmem_jax.memory import MEMORIES, memory_config, memory_of
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.processing import AnyImageConfig
from vlmem_jax.records import Rule
from vlmem_jax.trees import flatten

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Released:
    """What a released config.json says."""

    model: ModelConfig
    image: AnyImageConfig


@dataclasses.dataclass(frozen=True)
class Family:
    """A backbone: the tower it has, what its tensors are called, what its JSON files say, and its sizes."""

    tower: str
    """`vision.kind`."""
    image: type[AnyImageConfig]
    """The class of the config of images: what the tower sees are tiles or patches."""
    template: str
    """The chat template, a name of `chat.TEMPLATES`."""
    name_table: Callable[[ModelConfig, Any, int | None], list[Rule]]
    """`name_table(model, layout, vocab)`; see the modules. Layout None: as published."""
    layout: Callable[[Iterable[str]], Any]
    """Which of a family's ways of naming, `layouts`, the names of a checkpoint follow."""
    read_config: Callable[[Mapping[str, Any], Mapping[str, tuple[int, ...]], Mapping[str, Any]], Released]
    """`read_config(config.json, shapes of tensors, preprocessor_config.json)`; in the last, `video_processor` is what
    VIDEO_FILE holds."""
    write_files: Callable[..., dict[str, dict[str, Any]]]
    """`write_files(model, image, dtype, tokenizer)`: content of the JSON files, by name."""
    sizes: Mapping[str, dict[str, Any]]
    """Keys of `config.model` by the name of a model: `memory` is the kind that it has unless another is asked for, and
    `memories` has the keys of each kind."""
    layouts: tuple[Any, ...] = (True, False)
    adapter_layout: Any = None
    """The way of naming that adapters follow: that of the modules of today's libraries. None: of the checkpoint."""
    added_tokens: tuple[str, ...] = ()
    """What is added to the tokenizer of a language model that knows no images, in the order of ids."""
    apart: tuple[str, str] | None = None
    """Where checkpoints may lack the tower: how the names of its tensors begin there, and in a folder of its own."""
    unread: Callable[[ModelConfig], re.Pattern[str] | None] = lambda model: None
    """Names of tensors that nothing computes with; they are kept for the way back."""


def memory_tensors(config: ModelConfig, layer: str) -> list[Rule]:
    """The memory's part of a name table; `layer` is the name of a decoder layer, with {} for its number."""
    if config.memory is None:
        return []
    leaves = flatten(VLM(config).abstract()["memory"])
    return memory_of(config.memory).tensors(config.memory, config.decoder, leaves, layer)


IMAGE = "vlmem_image"
"""Key of the published files for what they have no key for."""


def write_image(image: AnyImageConfig, known: Collection[str]) -> dict[str, Any]:
    """What a file tells of images beside the keys `known` to it, where it is not the default."""
    default = to_dict(type(image)())
    own = {key: value for key, value in to_dict(image).items() if key not in known and value != default[key]}
    return {IMAGE: own} if own else {}


def read_image(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_image` told."""
    return dict(content.get(IMAGE) or {})


def read_memory(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Keys of the model that a config.json tells; `shapes` of the checkpoint's tensors fill in what it leaves out."""
    for name, memory in MEMORIES.items():
        if (found := memory.read_config(content, shapes)) is not None:
            return {"memory": memory_config({"kind": name} | found, "config.json")}
    return {}


def write_memory(model: ModelConfig) -> dict[str, Any]:
    """What config.json tells of a model's memory."""
    return memory_of(model.memory).write_config(model.memory, model.decoder)
