"""How an agent builds a memory and answers from it: the sections of its parts, and presets of all of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from vlmem_jax.agent.building import BuildConfig
from vlmem_jax.agent.model import ShowConfig
from vlmem_jax.agent.retrieve import RELEASE, RetrieveConfig
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import IngestConfig
from vlmem_jax.config import ConfigError, build, overlay, to_dict

Index = Literal["concepts", "words"]
"""`Schema`, or the `ReleaseSchema` of MM-Mem's release."""


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """All of it. Raises ValueError where sections do not fit together."""

    ingest: IngestConfig = IngestConfig()
    build: BuildConfig = BuildConfig()
    schema: SchemaConfig = SchemaConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    show: ShowConfig = ShowConfig()
    index: Index = "concepts"

    def __post_init__(self):
        images, most = self.retrieve.images, max(self.schema.kept, self.retrieve.episodes, self.retrieve.segments)
        if 0 < images < most:
            raise ValueError(
                f"an answer must show a frame of each node that it takes, up to {most}, but retrieve.images is "
                f"{images}; raise it, or lower schema.kept, retrieve.episodes and retrieve.segments"
            )


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # MM-Mem, section 3.3 and table 5, as far as there are parts for it: neither clips round salient frames, nor
    # prototypes of episodes, nor likeness of frames to a question.
    "paper": {
        "build": {"told": "either"},
        "retrieve": {
            "scaled": False,
            "episodes": 2,
            "segments": 1,
            "guard": 0,
            "worse": 4.0,  # beyond the entropy of as many options as there are letters: the last stage is believed
            "enough": 0.0,
        },
    },
    "release": {
        "ingest": {"tail": 0.0, "side": 0},
        "build": {"manage": {"reserved": 0}, "images": 0, "whole": True, "told": "captions", "attempts": 5},
        "retrieve": to_dict(RELEASE),
        "show": {"tokens": 0, "answer_tokens": 0},
        "index": "words",
    },
}
"""Keys by the name of a preset. A config names one and changes what it must."""


def resolve(config: ConfigDict | Mapping[str, Any] | str, where: str = "config.agent") -> AgentConfig:
    """The AgentConfig of `config.preset` (default: `default`) overlaid with the other keys of `config`; the name of a
    preset stands for a group that says no more.

    Raises ConfigError (a ValueError) that names the key: unknown preset or key, wrong type, value out of range.
    """
    config = {"preset": config} if isinstance(config, str) else config
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    name = given.pop("preset", "default")
    if name not in PRESETS:
        raise ConfigError(f"{where}.preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return build(AgentConfig, overlay(PRESETS[name], given), where)
