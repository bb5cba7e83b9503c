"""What a memory is to a model: a module that meets it at doors, and the one state that it carries while decoding.

    SEE      `take`: what the model sees of a frame, by those before it; between tower and projector
    ATTEND   `attend`: blocks in the decoder that read all visual tokens
    SPEAK    `form`: latent tokens between those of an answer, wherever the model calls for them

A door is a protocol; a memory goes through those whose functions it has, and `models/vlm.py` calls them without knowing
a memory by name. State is a `trees.State` of fixed capacity whose class declares the meaning of each axis, so that it
is laid out, repeated, inserted and saved like a key/value cache.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32, Int64

from vlmem_jax.decoder import DecoderConfig, Tap
from vlmem_jax.nn.lora import Adapters
from vlmem_jax.records import Rule
from vlmem_jax.trees import Flat, State
from vlmem_jax.types import FormationInputs, Geometry, GeometryShape, Patches, Text, VisualTokens


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Base of the configs of memories, each with a key `kind` of its own."""


class Start(NamedTuple):
    """Where parameters of a memory, stacked, start from."""

    path: str
    """In a layer of the decoder."""
    layers: tuple[int, ...]
    repeats: int = 1
    """How often each head stands in the memory."""

    def of(self, leaf_L: Any) -> Any:
        """From the decoder's parameters of all layers, of the axes [L, width, heads, head_dim] where heads repeat."""
        chosen = leaf_L[np.array(self.layers)]
        return chosen if self.repeats == 1 else chosen.repeat(self.repeats, axis=2)


Count = int | Int64[np.ndarray, "samples"]
"""A number, or one of each of many samples."""


class Memory(nnx.Module):
    """Base of all memories, which meet the model at some of the doors below."""

    config_type: type[MemoryConfig] = MemoryConfig
    """The class of its config, whose default `kind` is its name."""
    late_views: bool = False
    """Whether images may come after text that has been read; if not, a conversation is read again."""
    vision_layer: int | None = None
    """The layer of the vision tower whose inputs the memory keeps. None: none."""

    @classmethod
    def reads_beyond(cls, config: Any) -> bool:
        """Whether it reads visual tokens, or patches, that do not stand in the text; at the doors SEE and ATTEND, it
        does."""
        return issubclass(cls, See) or issubclass(cls, Attend)

    @classmethod
    def geometry_read(cls, config: Any, vision: Any) -> GeometryShape | None:
        """How much of the space that a tile shows it reads at the door SEE; None: nothing."""
        return None

    @classmethod
    def speech(cls, config: Any) -> "Speech | None":
        """How a memory with this config breaks into answers; None: it does not."""
        return None

    @classmethod
    def rates(cls, config: Any) -> dict[str, np.ndarray]:
        """Per-row learning-rate multipliers, by parameter path."""
        return {}

    @classmethod
    def flops(cls, config: Any, decoder: DecoderConfig, tokens: Count, visual: Count) -> tuple[Count, Count]:
        """Forward FLOPs beside the decoder's layers of samples with so many tokens and visual tokens: in weights, and
        in attention."""
        return 0, 0

    @classmethod
    def frames_kept(cls, config: Any) -> int:
        """How many frames it keeps for answers at the door SEE, at most."""
        return 0

    @classmethod
    def behind_projector(cls, config: Any) -> bool:
        """Whether frames come to the door SEE as visual tokens, without newlines, not as features of the tower."""
        return False

    @classmethod
    def frame_flops(cls, config: Any, decoder: DecoderConfig, vision: Any, frames: Count) -> tuple[Count, Count]:
        """Forward FLOPs at the door SEE of samples of so many frames: in weights, and in attention."""
        return 0, 0

    @classmethod
    def formation_flops(cls, config: Any, decoder: DecoderConfig, states: int, trained: Collection[str]) -> int:
        """FLOPs of forming one memory from `states` states, and of the gradient where it is trained; `trained` are
        paths in the memory."""
        return 0

    @classmethod
    def check_drawn_as_trained(cls, config: Any) -> None:
        """Raises ValueError, naming the key, where answers are drawn from other scores than training computes."""

    @classmethod
    def starts(cls, config: Any, decoder: DecoderConfig) -> dict[str, "Start"]:
        """Parameters, by path, that start as those of the decoder's layers."""
        return {}

    # in checkpoints

    wraps_layers: bool = False
    """Whether released checkpoints with it wrap every layer of the decoder."""
    free_keys: tuple[str, ...] = ()
    """Keys that may differ from those of a checkpoint."""

    @classmethod
    def pieces(cls, config: Any, decoder: DecoderConfig) -> tuple[DecoderConfig, int] | None:
        """A smaller decoder, and how many of its memories, stacked, are the whole: so it is made piece by piece. None:
        it is made at once."""
        return None

    @classmethod
    def tensors(cls, config: Any, decoder: DecoderConfig, leaves: Flat, layer: str) -> list[Rule]:
        """The memory's part of a name table. `leaves`: its parameters (shapes are enough) by path; `layer`: the name of
        a decoder layer, with {} for its number."""
        raise NotImplementedError(f"{cls.__name__} has no place in checkpoints")

    @classmethod
    def read_config(cls, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        """Our keys, as a config.json tells them; None of a checkpoint without this memory. `shapes` of its tensors fill
        in what is left out. Raises ValueError naming what neither tells."""
        return None

    @classmethod
    def write_config(cls, config: Any, decoder: DecoderConfig) -> dict[str, Any]:
        """What config.json tells of the memory."""
        return {}

    def metrics(self) -> dict[str, jax.Array]:
        """Scalars worth a curve, by name."""
        return {}


class Frame(NamedTuple):
    """A frame of each of several streams."""

    x_BND: Float[Array, "B N D"]
    """The features of its patches, or its visual tokens."""
    geometry: Geometry | None = None


@runtime_checkable
class See(Protocol):
    """The door SEE. A clip is its frames one after the other, in training and from a camera alike."""

    def begin(self, rows: int, dtype: jax.typing.DTypeLike, key: Array | None = None) -> State:
        """What is kept of streams of which nothing was seen yet. With a key, as in training, at random where it may."""

    def take(
        self, state: State, frame: Frame, valid_B: Bool[Array, "B"], fresh_B: Bool[Array, "B"]
    ) -> tuple[Float[Array, "B N D"], State]:
        """What the model sees of the next frame of each row, and the state after it. A row whose frame is not `valid`
        stays as it is, and the frame comes out as it came; one whose frame comes out with a number that is not finite
        stays, too. A `fresh` row forgets what was before."""

    def readout(self, state: State) -> tuple[Float[Array, "B L N D"], Int32[Array, "B L"]]:
        """What is kept for answers, oldest first, and when each was taken; -1, after the others: there is none."""


@runtime_checkable
class Attend(Protocol):
    """The door ATTEND."""

    def precompute(self, visual: VisualTokens) -> State:
        """What `attend` can read instead of visual tokens: computed once a prompt and kept while decoding."""

    def attend(
        self,
        seen: VisualTokens | State,
        positions_BT: Int32[Array, "B T"] | Int32[Array, "B T A"],
        segments_BT: Int32[Array, "B T"],
        index_BT: Int32[Array, "B T"] | None = None,
    ) -> Tap:
        """The blocks through which tokens at these positions read what was seen, or what was made of it.

        `index_BT`: the place of each token in its row, where rows go on; None where prompts are read.
        """


@runtime_checkable
class Speak(Protocol):
    """The door SPEAK. The tokens that call for latent ones, and those that end them, have rows of the memory's own."""

    def observe_prompt(
        self,
        text: Text,
        x_BTD: Float[Array, "B T D"],
        hidden_BTD: Float[Array, "B T D"],
        last_BD: Float[Array, "B D"],
        visual: VisualTokens | None,
    ) -> State:
        """What is kept of a prompt, whose tokens went into the decoder as x, came out as `hidden`, and ended with
        `last`."""

    def observe_tokens(
        self, state: State, last_BD: Float[Array, "B D"], counts_B: Int32[Array, "B"], reset: bool
    ) -> State:
        """The state after `counts_B` more tokens, of which the last came out as `last`. Rows with 0 stay.

        `reset`: others have spoken, so that what was observed before is forgotten.
        """

    def formation_inputs(
        self, state: State, rows_R: Int32[Array, "R"], kinds_R: Int32[Array, "R"], size: int
    ) -> tuple[FormationInputs, Patches | None]:
        """What memories of R of the rows (one beyond the last: none) are formed from, J = 1, with at most `size` states
        of the text; and the patches that they read of the rows' images."""

    def form(
        self,
        inputs: FormationInputs,
        decode: "Decode",
        key: jax.Array | None = None,
        through_tower: "ThroughTower | None" = None,
    ) -> Float[Array, "B J N D"]:
        """Latent tokens, to stand in a row in place of embeddings. With a key as in training, with dropout.

        `through_tower`: None without a `vision_layer`, and in a batch without patches.
        """

    def embed(self, tokens_BT: Int32[Array, "B T"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The embeddings x with those of the memory's own tokens in place."""

    def score(self, hidden: Float[Array, "... D"], logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        """The scores with those of the memory's own tokens in place."""

    def adopt(self, start: "TokenStart", key: jax.Array) -> None:
        """Starts the memory's own tokens from another, `Speech.start_id`."""


@dataclasses.dataclass(frozen=True)
class Speech:
    """How a memory breaks into an answer: a token of `invoke_ids` is followed by `lengths` latent tokens and a token of
    `end_ids`, which is never chosen. One entry a kind of memory."""

    kinds: tuple[str, ...]
    """Names of the kinds of memory by their number."""
    invoke_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    max_invocations: int
    """Most of them in one answer, so that the cache has a bound."""
    max_states: int
    """Most states of the text that a memory is formed from."""
    max_visual: int
    """Most states of images."""
    start_id: int
    """The token that those of the memory start from."""
    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    """Ids of the memory's own tokens by their text."""

    @property
    def latents(self) -> int:
        """N: latent tokens of the longest kind."""
        return max(self.lengths)

    @property
    def room(self) -> int:
        """Cache slots that invocations may take beside the tokens that are chosen."""
        return self.max_invocations * (self.latents + 1)


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


@runtime_checkable
class ThroughTower(Protocol):
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
