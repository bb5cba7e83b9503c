"""Whole models: a vision tower, a projector, a decoder, and a memory at its doors."""

from vlmem_jax.models.config import AdapterConfig, ModelConfig
from vlmem_jax.models.vlm import VLM

__all__ = ["VLM", "AdapterConfig", "ModelConfig"]
