"""Checkpoints on disk: one store a training stage, and the folders in which commands look for a model."""

from vlmem_jax.checkpoint.folder import Checkpoint, find
from vlmem_jax.checkpoint.store import (
    CheckpointConfig,
    CheckpointError,
    DamagedError,
    Store,
    load_params,
    save_params,
    stored_paths,
)

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "DamagedError",
    "Store",
    "find",
    "load_params",
    "save_params",
    "stored_paths",
]
