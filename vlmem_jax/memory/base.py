"""What a memory is to a model.

A memory keeps its state in a pytree of fixed capacity that pure functions make and read, so it jits, shards, donates
and checkpoints like a key/value cache. It meets the model at doors; a memory overrides those it uses:

    ATTEND   `attend`: blocks inside the decoder, before every E-th layer
    SPEAK    `speech`: latent tokens between those of an answer, wherever the model calls for them. `listen` and
             `follow` collect hidden states while decoding, `heard` gives those of an invocation, `form` turns them into
             embeddings, by `Decode` and `Read` if it likes; `embed` and `score` give its own tokens rows of their own

`models/vlm.py` calls the doors and knows no memory by name.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.decoder import Interleaved
from vlmem_jax.nn.lora import Adapters
from vlmem_jax.types import Batch, Heard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """All visual tokens of each row, what every memory is written from. Segment 0 is padding."""

    tokens_BMD: Float[Array, "B M D"]
    positions_BM: Int32[Array, "B M"]
    """Or [B, M, 3] under M-RoPE, as in `types.Batch`."""
    segments_BM: Int32[Array, "B M"]


@dataclasses.dataclass(frozen=True)
class Speech:
    """How a memory breaks into an answer: a token of `invoke_ids` is followed by `lengths` latent tokens and a token of
    `end_ids`, which is never chosen. One entry a kind of memory."""

    invoke_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    max_invocations: int
    """Most of them in one answer, so that the cache has a bound."""
    max_states: int
    """Most states of the text that `Memory.heard` gives."""
    start_id: int
    """The token that those of the memory start from."""
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ids of the memory's own tokens by their text."""

    @property
    def slots(self) -> int:
        """N: latent tokens of the longest kind."""
        return max(self.lengths)

    @property
    def room(self) -> int:
        """Cache slots that invocations may take beside the tokens that are chosen."""
        return self.max_invocations * (self.slots + 1)


@runtime_checkable
class Decode(Protocol):
    """The model's own decoder without a cache: states after the final norm."""

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int32[Array, "B T"],
        segments_BT: Int32[Array, "B T"],
        lora: Adapters | None,
    ) -> Float[Array, "B T D"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """All patches of each row where they enter layer `Memory.vision_layer` of the vision tower."""

    x_BNE: Float[Array, "B N E"]
    layout_BI4: Int32[Array, "B I 4"]
    """As in `types.Batch`."""
    segments_BI: Int32[Array, "B I"]
    """Samples to which tiles belong; 0 is padding."""


@runtime_checkable
class Read(Protocol):
    """The model's own vision tower from layer `Memory.vision_layer` on, and its projector.

    Each time that the memory speaks, F rows stand behind the patches: they see each other and the patches of their
    sample, and nothing else sees them. The last `out` become latent tokens, zeros where the sample has no patches.
    """

    def __call__(self, rows_BJFE: Float[Array, "B J F E"], out: int, lora: Adapters) -> Float[Array, "B J N D"]: ...


class TokenStart(NamedTuple):
    """What a new token may start from."""

    embedding_D: Float[Array, "D"]
    scoring_D: Float[Array, "D"]
    """Of another token, as it goes in and as it is scored."""
    rms: Float[Array, ""]
    """Mean root mean square of all embeddings."""

    @classmethod
    def of(cls, embed_VD: Float[Array, "V D"], head_VD: Float[Array, "V D"], token: int) -> "TokenStart":
        rms = jnp.sqrt(jnp.mean(embed_VD.astype(jnp.float32) ** 2, axis=-1)).mean()
        return cls(embed_VD[token], head_VD[token], rms)


class Memory(nnx.Module):
    """Base of all memories."""

    vision_layer: int | None = None
    """SPEAK: the layer of the vision tower from which on `form` goes through it. None: it does not."""

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

    @classmethod
    def speech(cls, config: Any) -> Speech | None:
        """SPEAK: of a memory with this config. None: no such door."""
        return None

    def embed(self, tokens_BT: Int32[Array, "B T"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """SPEAK: the embeddings x with those of the memory's own tokens in place."""
        return x_BTD

    def score(self, hidden_BTD: Float[Array, "B T D"], logits_BTV: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """SPEAK: the scores with those of the memory's own tokens in place."""
        return logits_BTV

    def listen(
        self,
        batch: Batch,
        x_BTD: Float[Array, "B T D"],
        hidden_BTD: Float[Array, "B T D"],
        last_BD: Float[Array, "B D"],
    ) -> Any:
        """SPEAK: what is kept of a prompt, whose tokens went into the decoder as x, came out as `hidden`, and ended
        with `last`."""
        return None

    def follow(self, listening: Any, last_BD: Float[Array, "B D"], counts_B: Int32[Array, "B"], anew: bool) -> Any:
        """SPEAK: the state after `counts_B` more tokens, of which the last came out as `last`. Rows with 0 stay.

        `anew`: others have spoken, so that what was heard before is forgotten.
        """
        return listening

    def heard(self, listening: Any, rows_R: Int32[Array, "R"], kinds_R: Int32[Array, "R"], size: int) -> Heard:
        """SPEAK: the states of R of the rows (one beyond the last: none), J = 1, whose texts have at most `size`."""
        raise NotImplementedError(f"{type(self).__name__} does not speak")

    def form(
        self, heard: Heard, decode: Decode, key: jax.Array | None = None, read: Read | None = None
    ) -> Float[Array, "B J N D"]:
        """SPEAK: latent tokens, to stand in a row in place of embeddings. With a key as in training, with dropout.

        `read`: None without a `vision_layer`, and in a batch without patches.
        """
        raise NotImplementedError(f"{type(self).__name__} does not speak")

    def adopt(self, start: TokenStart, key: jax.Array) -> None:
        """SPEAK: starts the tokens of the memory's own from another, `Speech.start_id`."""

    @classmethod
    def rates(cls, config: Any) -> dict[str, np.ndarray]:
        """By what the learning rate of some of its parameters is multiplied, row by row: path -> factors."""
        return {}

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars worth a curve, by name."""
        return {}
