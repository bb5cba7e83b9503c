"""What a memory is to a model.

A memory keeps its state in a pytree of fixed capacity that pure functions make and read, so it jits, shards, donates
and checkpoints like a key/value cache. It meets the model at doors; a memory overrides those it uses:

    ATTEND   `attend`: blocks inside the decoder, before every E-th layer

`models/vlm.py` calls the doors and knows no memory by name.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.decoder import Interleaved


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """All visual tokens of each row, what every memory is written from. Segment 0 is padding."""

    tokens_BMD: Float[Array, "B M D"]
    positions_BM: Int32[Array, "B M"]
    """Or [B, M, 3] under M-RoPE, as in `types.Batch`."""
    segments_BM: Int32[Array, "B M"]


class Memory(nnx.Module):
    """Base of all memories."""

    def attend(
        self,
        seen: VisualTokens | Any,
        positions_BT: Int32[Array, "B T"] | Int32[Array, "B T A"],
        segments_BT: Int32[Array, "B T"],
    ) -> Interleaved | None:
        """ATTEND: the blocks through which tokens at these positions read. `seen` is what was seen, or `recall` of it.

        None: no such door.
        """
        return None

    def recall(self, seen: VisualTokens) -> Any:
        """What `attend` can read instead of `seen`, computed once a prompt and kept while decoding."""
        return None

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars worth a curve, by name."""
        return {}
