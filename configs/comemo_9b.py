"""CoMemo-9B: InternViT-300M, InternLM2-7B and memory blocks (arXiv 2506.06279)."""

from pathlib import Path

from ml_collections import ConfigDict

from vlmem_jax.config import load


def get_config(profile: str | None = None) -> ConfigDict:
    """The experiment of comemo_2b.py, profiles included, with the larger language model."""
    config = load(f"{Path(__file__).with_name('comemo_2b.py')}:{profile or ''}")
    config.model.preset = "comemo_9b"
    config.model.remat = "full"  # fits v5e; on v5p, remat=dots with vision_remat=full is faster
    config.init = config.tokenizer = "checkpoints/InternVL2-8B"
    return config
