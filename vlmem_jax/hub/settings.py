"""What a released config.json says."""

import dataclasses

from vlmem_jax.models import ModelConfig
from vlmem_jax.processing import ImageConfig, PatchConfig


@dataclasses.dataclass(frozen=True)
class Released:
    """What a released config.json says."""

    model: ModelConfig
    image: ImageConfig | PatchConfig
    template: str
