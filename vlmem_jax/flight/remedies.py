"""What may help a training step that does not fit: settings worth compiling again with."""

from typing import Any

from jax.sharding import Mesh

from vlmem_jax.runtime.sharding import batch_shards
from vlmem_jax.train.config import Experiment, StageConfig

Remedy = dict[str, Any]
"""Changes of an experiment: key -> value."""


def remedies(experiment: Experiment, stage: StageConfig, mesh: Mesh) -> list[Remedy]:
    """Each to be tried alone, those that cost least time first."""
    shape, parts = mesh.shape, experiment.parts(stage, mesh)
    rows = experiment.data_of(stage).rows // parts // batch_shards(mesh)
    tried: list[Remedy] = []
    if rows > 1:
        tried.append({f"stages.{stage.name}.accumulation": 2 * parts})
    if shape["data"] > 1:
        tried.append({"mesh.data": 1, "mesh.fsdp": -1})
    model = experiment.model
    if (model.vision_remat or model.remat) not in ("full", "offload"):
        tried.append({"model.vision_remat": "full"})
    if model.remat not in ("full", "offload"):
        tried.append({"model.remat": "full"})
    if experiment.model.remat != "offload":
        tried.append({"model.remat": "offload"})
    if experiment.optimizer_of(stage).state_dtype == "float32":
        tried.append({"optimizer.state_dtype": "bfloat16"})
    heads = experiment.model.decoder.heads
    for axis in ("context", "tensor"):
        if shape["fsdp"] % 2 == 0 and heads % (2 * shape["tensor"] * shape["context"]) == 0:
            more = {} if rows > 1 else {f"stages.{stage.name}.accumulation": 2 * parts}
            tried.append({f"mesh.{axis}": 2 * shape[axis], "mesh.fsdp": shape["fsdp"] // 2, **more})
    return tried
