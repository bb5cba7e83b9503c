"""What a model is made of."""

import dataclasses
from typing import Literal

from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.memory import MemoryConfig
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.nn.lora import LinearMap, LoRAConfig
from vlmem_jax.nn.stack import REMAT_POLICIES
from vlmem_jax.vision import ProjectorConfig, Qwen3ViTConfig, QwenViTConfig, SigLIPConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """A low-rank adapter of the model, whose parameters are `adapters/NAME/...`."""

    name: str
    rank: int = 16
    alpha: float = 32.0
    """W x + (alpha / rank) B A x takes the place of W x."""
    dropout: float = 0.0
    """Share of the adapter's inputs that is left out, in training alone."""
    targets: tuple[str, ...] = ("q", "v")
    """Linear maps of the decoder's layers: q, k, v, o, gate, up, down."""
    vision: tuple[str, ...] = ()
    """Linear maps of the tower's layers: q, k, v, proj, and fc1, fc2 or gate, up, down."""

    def __post_init__(self):
        if not self.name.isidentifier() or self.name == "none":
            raise ValueError(f"name must be of letters, digits and _, and not none; got {self.name!r}")
        if not self.parts:
            raise ValueError(f"targets or vision must name a linear map; those of adapter {self.name} name none")

    @property
    def parts(self) -> dict[str, LoRAConfig]:
        """What it is in the decoder and in the tower, where it is."""
        targets = {"decoder": self.targets, "vision": self.vision}
        return {part: LoRAConfig(self.rank, self.alpha, self.dropout, some) for part, some in targets.items() if some}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model; `families.resolve` fills it from a preset's name and the keys that differ."""

    vision: VisionConfig | QwenViTConfig | Qwen3ViTConfig | SigLIPConfig
    """Its key `kind` says which, see `vision.TOWERS`."""
    decoder: DecoderConfig
    projector: ProjectorConfig = ProjectorConfig()
    """Of towers that see tiles; those that see patches have a merger without keys of its own."""
    memory: MemoryConfig | None = None
    """The memory that lives in the model: its key `kind` is a name of memory.MEMORIES. None: none."""
    adapters: tuple[AdapterConfig, ...] = ()
    """Low-rank adapters beside the model's weights. What is read goes through the first unless told otherwise."""
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
        names = [adapter.name for adapter in self.adapters]
        if len(set(names)) < len(names):
            raise ValueError(f"adapters must have names of their own, got {', '.join(names)}")
        for adapter in self.adapters:
            for key, part, wanted in (("targets", "decoder", adapter.targets), ("vision", "vision", adapter.vision)):
                maps = self.linear_maps[part]
                if unknown := [target for target in wanted if target not in maps]:
                    raise ValueError(
                        f"adapters.{adapter.name}.{key} must be among {', '.join(maps)}; got {', '.join(unknown)}"
                    )
        if bool(self.decoder.rope_sections) != (self.vision.tile.axes > 1):
            raise ValueError(
                "decoder.rope_sections belong to a tower that places tokens on three axes; "
                f"got rope_sections {self.decoder.rope_sections} and kind {self.vision.kind}"
            )

    def adapter_number(self, name: str) -> int:
        """The place of the adapter `name` among those of the model; -1 of none. Raises ValueError for others."""
        names = [adapter.name for adapter in self.adapters]
        if name not in ("none", *names):
            raise ValueError(f"the adapter must be none{''.join(f', {one}' for one in names)}; got {name!r}")
        return names.index(name) if name in names else -1

    @property
    def linear_maps(self) -> dict[str, dict[str, LinearMap]]:
        """The maps of each part of the model that may have adapters."""
        return {"decoder": self.decoder.linear_maps, "vision": self.vision.linear_maps}

    @property
    def memory_kind(self) -> str:
        """The name of the memory, or none."""
        return "none" if self.memory is None else self.memory.kind
