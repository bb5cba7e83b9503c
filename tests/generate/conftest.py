"""A tiny model whose memory is switched on, and prompts for it."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import drawn
from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.types import Sample


@pytest.fixture(scope="session")
def vlm():
    return VLM(resolve({"preset": "tiny"}))


@pytest.fixture(scope="session")
def params(vlm):
    params = drawn.params(vlm)
    blocks = params["memory"]["blocks"]
    for gate in ("attn_gate", "mlp_gate"):
        blocks[gate] = jnp.full_like(blocks[gate], 0.7)
    return params


@pytest.fixture(scope="session")
def make_prompt(vlm):
    """A prompt of random tokens, equal for equal seeds, with `tiles` random tiles after its third token."""

    def make(length: int, tiles: int, seed: int = 0) -> Sample:
        rng = np.random.default_rng(seed)
        size, m = vlm.config.vision.image_size, tiles * vlm.tokens_per_tile
        slots = np.full(length + m, -1, np.int32)
        slots[3 : 3 + m] = np.arange(m)
        # tiles share positions, as under RoPE-DHR
        image_positions = np.tile(np.arange(3, 3 + vlm.tokens_per_tile), tiles)
        rest = np.arange(length - 3) + 3 + (vlm.tokens_per_tile if tiles else 0)
        return Sample(
            tokens_T=rng.integers(5, 100, length + m).astype(np.int32),
            labels_T=np.full(length + m, -100, np.int32),
            positions_T=np.concatenate([np.arange(3), image_positions, rest]).astype(np.int32),
            visual_index_T=slots,
            pixels_ISSc=rng.integers(0, 256, (tiles, size, size, 3)).astype(np.uint8),
            visual_positions_M=image_positions.astype(np.int32),
            name=f"prompt {seed}",
        )

    return make
