"""The keys of a whole experiment: everything that `vlmem train` needs to know."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlmem_jax import families
from vlmem_jax.checkpoint import CheckpointConfig
from vlmem_jax.config import ConfigError, build, to_dict
from vlmem_jax.data.config import DataConfig
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.models.placement import check_heads
from vlmem_jax.processing import AnyImageConfig
from vlmem_jax.runtime.sharding import MeshConfig, batch_shards
from vlmem_jax.train.profile import ProfileConfig
from vlmem_jax.types import TileShape


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on everything, or Muon on the matrices inside layers and AdamW on the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Times the learning rate; on every trained parameter."""
    clip_norm: float = 1.0
    """Gradients whose global norm is larger are scaled down to it."""
    muon_momentum: float = 0.95
    muon_rms: float = 0.2
    """Root mean square of a Muon update before the learning rate; 0.2 is that of AdamW (arXiv 2502.16982)."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the moments: in bfloat16 they take half the memory, see `optimizer.in_bfloat16`."""

    def __post_init__(self):
        for key in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, got {getattr(self, key)}")
        for key in ("eps", "clip_norm", "muon_rms"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stretch of training. It starts from the last checkpoint of the stage before it."""

    name: str
    """Folder of its checkpoints; unique in an experiment."""
    steps: int
    """Optimizer steps."""
    learning_rate: float
    """After warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: as it is, or down half a cosine to final_fraction of it at the end."""
    final_fraction: float = 0.0
    warmup_fraction: float = 0.03
    """Part of the steps in which the learning rate rises linearly."""
    trainable: tuple[str, ...] = ("",)
    """Regular expressions; a parameter is trained if one matches the start of its path, such as memory/blocks/attn."""
    frozen: tuple[str, ...] = ()
    """Regular expressions that take parameters out of `trainable` again."""
    accumulation: int = 1
    """Parts that the rows of a step are cut into, worked on one after the other to save memory; 0: as many as leave
    each device one row at a time."""
    task: dict = dataclasses.field(default_factory=lambda: {"kind": "next_token"})
    """What is learned, with the keys of it beside its kind: next_token; grpo, from rewards; or memory_sft, to form
    memories that answers profit from (see `rl.config`)."""
    adapter: str = ""
    """Name of the model's adapter that everything is read through, or none; empty: the first that the model has."""
    optimizer: OptimizerConfig | None = None
    """In place of the experiment's."""
    data: DataConfig | None = None
    """In place of the experiment's."""

    moved: ClassVar[dict[str, str]] = {"rl": "its keys stand in task, as task=dict(kind='grpo', ...)"}

    def __post_init__(self):
        if not isinstance(self.task, dict):
            object.__setattr__(self, "task", {"kind": self.task})
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be a number of at least 0, got {self.learning_rate}")
        if self.steps < 1 or self.accumulation < 0:
            raise ValueError(f"steps must be at least 1, accumulation 0; got {self.steps} and {self.accumulation}")
        if not self.name or set(self.name) & set("/\\.") or self.name.isdigit():
            raise ValueError(f"name becomes a folder: letters, digits, - and _, not digits alone; got {self.name!r}")
        for key in ("final_fraction", "warmup_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be from 0 to 1, got {getattr(self, key)}")

    @property
    def task_kind(self) -> str:
        """The name of the task."""
        return self.task.get("kind", "")

    @property
    def task_keys(self) -> dict[str, Any]:
        """The keys of the task, beside its kind."""
        return {key: value for key, value in self.task.items() if key != "kind"}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Model, data, stages and how to run them."""

    model: ModelConfig
    tokenizer: str
    """Folder with tokenizer.json or tokenizer.model."""
    stages: tuple[StageConfig, ...]
    image: AnyImageConfig
    """How images become tiles or patches, as the tower of the model takes them."""
    data: DataConfig = DataConfig()
    system: str | None = None
    """System message of the prompt; None: that of the family's template."""
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: str | None = None
    """Where the first stage starts: a checkpoint folder or one in the Hugging Face layout; None: random."""
    seed: int = 42
    eval_every: int = 500
    """Steps between evaluations on data.eval; the last step of a stage is always evaluated."""
    log_every: int = 10
    """Steps between records of metrics."""
    log_samples: bool = False
    """Whether each host writes the samples of every step to WORKDIR/samples."""
    profile: ProfileConfig = ProfileConfig()
    loss_chunk: int = 1024
    """Tokens of a row whose logits exist at the same time."""

    moved: ClassVar[dict[str, str]] = {"template": "the family of the model tells it"}

    def __post_init__(self):
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages must have at least one element, and names of their own; got {names}")
        for key in ("eval_every", "log_every", "loss_chunk"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.checkpoint.keep_best and self.checkpoint.every % self.eval_every:
            raise ValueError(
                f"checkpoint.every {self.checkpoint.every} must be a multiple of eval_every {self.eval_every}, so that "
                "each checkpoint has an evaluation loss; or set checkpoint.keep_best=0"
            )
        for stage in self.stages:
            if stage.adapter:
                try:
                    self.model.adapter_number(stage.adapter)
                except ValueError as error:
                    raise ValueError(f"stages.{stage.name}.adapter: {error}") from error
            rows = self.data_of(stage).rows
            if stage.accumulation and rows % stage.accumulation:
                raise ValueError(
                    f"data.rows {rows} must be a multiple of stages.{stage.name}.accumulation {stage.accumulation}"
                )

    @property
    def tile(self) -> TileShape:
        """What a tile is to the model, with this config of images."""
        return VLM(self.model).tile_of(self.image)

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises ConfigError, naming the keys, where rows, tokens, tiles or heads cannot be split over `mesh`."""
        shape, rows_split = mesh.shape, batch_shards(mesh)
        context = shape["context"]
        check_heads(self.model, mesh)
        for stage in self.stages:
            data = self.data_of(stage)
            at_once = data.rows // self.parts(stage, mesh)
            if at_once % rows_split:
                raise ConfigError(
                    f"mesh.data x mesh.fsdp = {rows_split} must divide the {at_once} rows of a batch that stage "
                    f"{stage.name} works on at a time; change data.rows {data.rows}, "
                    f"stages.{stage.name}.accumulation {stage.accumulation} or the mesh"
                )
            for key in ("pack_tokens", "pack_tiles"):
                if getattr(data, key) % context:
                    raise ConfigError(f"mesh.context={context} must divide data.{key} {getattr(data, key)}")

    def parts(self, stage: StageConfig, mesh: Mesh) -> int:
        """Parts that a stage's rows are cut into on `mesh`, worked on one after the other."""
        return stage.accumulation or max(self.data_of(stage).rows // batch_shards(mesh), 1)

    @property
    def template(self) -> str:
        """The chat template of the model's family."""
        return families.of_model(self.model).template

    def model_of(self, stage: StageConfig) -> VLM:
        """The model as a stage reads with it."""
        return VLM(self.model, self.model.adapter_number(stage.adapter) if stage.adapter else 0)

    def data_of(self, stage: StageConfig) -> DataConfig:
        """Data of a stage."""
        return stage.data or self.data

    def optimizer_of(self, stage: StageConfig) -> OptimizerConfig:
        """Optimizer of a stage."""
        return stage.optimizer or self.optimizer


def experiment(config: ConfigDict | Mapping[str, Any]) -> Experiment:
    """Experiment from a ConfigDict, or from the dict of a config.json. Raises ConfigError, which names the key."""
    values = to_dict(config)
    if "model" in values:
        values["model"] = model = families.resolve(values["model"])
        values["image"] = build(families.of_model(model).image, values.get("image", {}), "config.image")
    return build(Experiment, values)
