"""What a model is made of."""

import dataclasses
from typing import Literal

from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.memory import MemoryConfig
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.nn.stack import REMAT_POLICIES
from vlmem_jax.vision import ProjectorConfig, QwenViTConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model; `families.resolve` fills it from a preset's name and the keys that differ."""

    vision: VisionConfig | QwenViTConfig
    """Its key `kind` says which, see `vision.TOWERS`."""
    decoder: DecoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    """Of towers that see tiles; those that see patches have a merger without keys of its own."""
    memory: MemoryConfig | None = None
    """The memory that lives in the model: its key `kind` is a name of memory.MEMORIES. None: none."""
    attention: AttentionConfig = AttentionConfig()
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of activations and matmuls; softmax, norms, angles and logits are fp32 always."""
    remat: str = "dots"
    """What layers recompute in the backward pass: none, dots (all but weight matmuls), attention (all but causal
    attention), full, or offload (full, with what is kept in the host's memory). Scanned layers store what they keep, so
    `dots` takes half the memory of `none` and is no slower."""
    vision_remat: str = ""
    """The same for the vision tower; empty: as `remat`."""

    def __post_init__(self):
        for key, value, allowed in (
            ("remat", self.remat, tuple(REMAT_POLICIES)),
            ("vision_remat", self.vision_remat, ("", *REMAT_POLICIES)),
        ):
            if value not in allowed:
                raise ValueError(f"{key} must be one of {', '.join(allowed)}; got {value!r}")
        if bool(self.decoder.rope_sections) != (self.vision.tile.axes > 1):
            raise ValueError(
                "decoder.rope_sections belong to a tower that places tokens on three axes; "
                f"got rope_sections {self.decoder.rope_sections} and kind {self.vision.kind}"
            )

    @property
    def memory_kind(self) -> str:
        """The name of the memory, or none."""
        return "none" if self.memory is None else self.memory.kind
