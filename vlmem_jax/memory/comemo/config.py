"""Sizes of CoMemo's blocks."""

import dataclasses
from typing import Literal

from vlmem_jax.memory.base import MemoryConfig


@dataclasses.dataclass(frozen=True)
class CoMemoConfig(MemoryConfig):
    """Sizes of the memory blocks; width is the decoder's."""

    every: int = 4
    """A block stands before each decoder layer l with (l + 1) % every == 0."""
    heads: int = 16
    head_dim: int = 128
    mlp_width: int = 8192
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    start: Literal["random", "attention"] = "random"
    """What new blocks start from: random numbers, or the attention of the decoder's layer that each stands before,
    whose heads must then be those of the block, and an MLP that adds nothing yet."""
    gate: float = 0.0
    """tanh of it is what new blocks' attention is multiplied by, and with start=attention their MLP, too; the published
    0 leaves the decoder as it was."""
    decode_position: Literal["continue", "length"] = "continue"
    """Position of generated tokens as memory queries: the next rotary position, or (as the published inference code
    does, unlike its training) the number of tokens so far."""

    kind: Literal["comemo"] = "comemo"

    def __post_init__(self):
        if min(self.every, self.heads, self.head_dim, self.mlp_width) < 1 or self.head_dim % 2:
            raise ValueError(f"sizes must be positive and head_dim even, got {self}")
