"""The data that crosses package borders: one sample on the host, one packed batch on the device."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Shaped, UInt8

from vlmem_jax.trees import State, axes

IGNORED = -100
"""Label of a token that is not a training target."""


class TileGeometry(NamedTuple):
    """How a vision tower sees a tile."""

    size: int
    """Side, pixels."""
    tokens_per_side: int


class FrameGeometry(NamedTuple):
    """How a vision tower sees a frame of a video, whatever its shape."""

    size: int
    """Side that it is resized to, pixels."""
    tokens: int
    """Visual tokens of a frame, those that end its rows among them."""


class PatchGeometry(NamedTuple):
    """How a vision tower cuts what it sees."""

    size: int
    """Side of a patch, pixels."""
    frames: int
    """Of a patch; an image fills them with copies."""
    merge: int
    """Patches along a side of the block that becomes one visual token."""
    window: int
    """Visual tokens along a side of a window; 0: a frame is one."""
    tokens_per_second: float
    """Rotary positions that a second of video takes; 0: none."""

    @property
    def factor(self) -> int:
        """Sides of a resized image are multiples of so many pixels."""
        return self.size * self.merge


class StepGeometry(PatchGeometry):
    """The same of a tower whose models are told in words when each step of time of a video is."""


class GeometryShape(NamedTuple):
    """How much of the space that a tile shows a memory reads: the axes of `Geometry`."""

    patches: int
    """N."""
    tokens: int
    """G: numbers of a geometry token."""
    views: int
    """V: numbers of a view token."""


class TileShape(NamedTuple):
    """What a vision tower takes at a time, a tile, and what a model makes of it."""

    side: int
    """S: pixels along a side, or, where tiles are blocks of patches, patches."""
    channels: int
    """c: colours of a pixel, or all values of a patch: [colour, frame, y, x] in one axis."""
    tokens: int
    """P: visual tokens that the tile becomes."""
    layout: bool = False
    """Whether tiles of an image see each other, so that the tower needs to know their places."""
    axes: int = 1
    """Rotary positions of a token: 1, or 3 (time, row, column)."""
    pooled: bool = False
    """Whether means of visual tokens stand in the sequence, in place of the tokens."""
    places: int = 1
    """As in `Views`."""
    geometry: GeometryShape | None = None
    """What a memory reads beside the tile. None: nothing."""
    keeps: int = 0
    """Tiles of a sample that a memory has room for, and that alone stand in the sequence. 0: all of them may."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
    """What is known of the space that frames show, N patches each; leading axes are those of the frames."""

    tokens_BNG: Float[Array, "... N G"]
    """What a model of geometry makes of each patch."""
    views_BNV: Float[Array, "... N V"]
    """What it knows of the camera there."""
    coords_BN3: Float[Array, "... N 3"]
    """The point that each patch shows, fp32, of about unit size."""

    @classmethod
    def empty(cls, frames: tuple[int, ...], shape: GeometryShape) -> "Geometry":
        """Zeros with leading axes `frames`, in numpy arrays: of padding, and where nothing is known."""
        N, G, V = shape
        tokens, views = (np.zeros((*frames, N, size), jnp.bfloat16) for size in (G, V))
        return cls(tokens, views, np.zeros((*frames, N, 3), np.float32))

    def put(self, where: Any, other: "Geometry") -> None:
        """Writes that of other frames to the places `where` of numpy arrays."""
        for mine, theirs in zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True):
            mine[where] = theirs


@dataclasses.dataclass(frozen=True)
class Sample:
    """One conversation ready for the model, on the host.

    T tokens, I tiles of S x S pixels, P visual tokens a tile, M = I * P memory slots; see `TileShape`.
    """

    tokens_T: Int32[np.ndarray, "T"]
    labels_T: Int32[np.ndarray, "T"]
    """The token itself where it is a target, IGNORED elsewhere; not shifted."""
    positions_T: Int32[np.ndarray, "T"] | Int32[np.ndarray, "T 3"]
    """Rotary position; repeats under RoPE-DHR."""
    visual_index_T: Int32[np.ndarray, "T"]
    """Which of the sample's M visual tokens, or of their means, replaces this token's embedding; -1 for text."""
    pixels_ISSc: UInt8[np.ndarray, "I S S c"]
    visual_positions_M: Int32[np.ndarray, "M"] | Int32[np.ndarray, "M 3"]
    """Rotary position of each visual token as a memory key."""
    layout_I4: Int32[np.ndarray, "I 4"] | None = None
    """As in `Views`."""
    pool_M: Int32[np.ndarray, "M"] | None = None
    """Which mean each visual token is part of; None: the tokens themselves stand in the sequence."""
    geometry: Geometry | None = None
    """Of each tile, where a memory reads it."""
    name: str = ""
    """Where the sample came from, as `file:line`, for error messages."""

    @property
    def known_geometry(self) -> Geometry:
        """`geometry`, where a memory reads it. Raises ValueError if nobody has given it."""
        if self.geometry is None:
            where = f" (sample {self.name})" if self.name else ""
            raise ValueError(
                "the memory reads geometry of what it sees, but none is known here; name what makes it (--geometry of "
                f"a command, data.train.0.geometry of a run), or set model.memory.geometry_width=0{where}"
            )
        return self.geometry


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """The tokens of packed rows, placeholders of visual tokens among them.

    B rows, T token slots; a segment id says to which sample of its row a slot belongs: 1, 2, ... and 0 for padding,
    which follows the tokens. `...` is empty or a leading axis of gradient accumulation.
    """

    tokens_BT: Int32[Array, "... B T"]
    segments_BT: Int32[Array, "... B T"]
    positions_BT: Int32[Array, "... B T"] | None = None
    """Rotary positions, or [B, T, 3], of time, row and column, where the model has M-RoPE. None: each row goes on where
    it stands."""
    visual_index_BT: Int32[Array, "... B T"] | None = None
    """Which of the row's M visual tokens, or of their means, replaces this token's embedding; -1 for text, and None for
    text alone. Latent tokens follow the visual ones: M + j * N + n is latent token n of time j."""
    targets_BT: Int32[Array, "... B T"] | None = None
    """The token that position t must predict, the next one; 0 where the weight is 0. None: nothing is learned."""
    weights_BT: Float32[Array, "... B T"] | None = None
    """Weight of that target in the loss."""
    formation: "FormationInputs | None" = None
    """From what a memory that speaks forms latent tokens of each row, N a time."""
    prefix_BT: Int32[Array, "... B T"] | None = None
    """The segment whose earlier tokens a token sees beside those of its own, 0: none; so answers share a prompt, which
    stands once before them. None: there is nothing shared."""

    @property
    def samples_BT(self) -> Int32[Array, "... B T"]:
        """The segment whose views a token may see: that of its prefix, or else its own."""
        if self.prefix_BT is None:
            return self.segments_BT
        return jnp.where(self.prefix_BT > 0, self.prefix_BT, self.segments_BT)

    @classmethod
    def first(cls, tokens_BT: Int32[Array, "B T"], counts_B: Int32[Array, "B"]) -> "Text":
        """The first `counts_B` tokens of each row, which go on where the row stands."""
        return cls(tokens_BT, (jnp.arange(tokens_BT.shape[1]) < counts_B[:, None]).astype(jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Views:
    """What packed rows show: I tile slots of each, M = I * P visual tokens. Padding follows the tiles.

    Tokens and tiles are packed on separate axes; segment ids are those of `Text`.
    """

    pixels_BISSc: UInt8[Array, "... B I S S c"]
    positions_BM: Int32[Array, "... B M"]
    """Rotary position of each visual token; or [B, M, 3], as those of the text."""
    segments_BM: Int32[Array, "... B M"]
    layout_BI4: Int32[Array, "... B I 4"] | None = None
    """Where tiles see each other: 1 + the index, in the row, of the first tile of the tile's window and of its frame,
    and its own row and column in the image; zeros for padding. None where each tile is on its own."""
    pool_BM: Int32[Array, "... B M"] | None = None
    """Which of the row's M means each visual token is part of; -1 for padding. None: the tokens themselves stand in the
    sequence."""
    geometry: Geometry | None = None
    """Of each tile [B, I, N, ...], where a memory reads it."""
    places: int = dataclasses.field(default=1, metadata=dict(static=True))
    """So many places of visual tokens make a rotary position: positions_BM counts places, from 0 in each position."""
    kept_first: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """Whether tiles that the memory keeps at the end of a sample change places with others, so that they come first."""

    def moved(self, by: Int32[Any, "B #M"] | Int32[Any, "B #M 1"]) -> "Views":
        """The same, so many rotary positions later."""
        by = by * self.places if self.places > 1 else by
        return dataclasses.replace(self, positions_BM=self.positions_BM + by)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of packed samples, for training, evaluation and rollouts alike."""

    text: Text
    views: Views

    @classmethod
    def of(cls, **fields: Any) -> "Batch":
        """From the fields of both by their names."""
        text = {field.name for field in dataclasses.fields(Text)}
        return cls(
            Text(**{name: x for name, x in fields.items() if name in text}),
            Views(**{name: x for name, x in fields.items() if name not in text}),
        )

    def replace(self, **fields: Any) -> "Batch":
        """A copy with fields of text or views replaced."""
        return Batch.of(**{**vars(self.text), **vars(self.views), **fields})

    @classmethod
    def empty(cls, shape: tuple[int, ...], tokens: int, tiles: int, tile: TileShape) -> "Batch":
        """Nothing but padding, in numpy arrays with leading axes `shape`: T = `tokens`, I = `tiles`."""

        def zeros(*axes: int, dtype=np.int32) -> np.ndarray:
            return np.zeros((*shape, *axes), dtype)

        axes, slots = (tile.axes,) * (tile.axes > 1), tiles * tile.tokens
        return cls.of(
            tokens_BT=zeros(tokens),
            segments_BT=zeros(tokens),
            positions_BT=zeros(tokens, *axes),
            visual_index_BT=zeros(tokens) - 1,
            targets_BT=zeros(tokens),
            weights_BT=zeros(tokens, dtype=np.float32),
            pixels_BISSc=zeros(tiles, tile.side, tile.side, tile.channels, dtype=np.uint8),
            positions_BM=zeros(slots, *axes),
            segments_BM=zeros(slots),
            layout_BI4=zeros(tiles, 4) if tile.layout else None,
            pool_BM=zeros(slots) - 1 if tile.pooled else None,
            geometry=tile.geometry and Geometry.empty((*shape, tiles), tile.geometry),
            places=tile.places,
            kept_first=bool(tile.keeps),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches(State):
    """All patches of each row as they enter a layer of the vision tower that a memory reads."""

    x_BNE: Float[Array, "B N E"] = axes("batch", "patches", "channels")
    layout_BI4: Int32[Array, "B I 4"] = axes("batch", "tiles", None)
    """As in `Views`."""
    segments_BI: Int32[Array, "B I"] = axes("batch", "tiles")
    """Samples to which tiles belong; 0 is padding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VisualTokens:
    """What the model sees of each row's views: visual tokens, all of which memories read."""

    tokens_BMD: Float[Array, "B M D"]
    positions_BM: Int32[Array, "B M"]
    """As in `Views`; so are the segments."""
    segments_BM: Int32[Array, "B M"]
    deep_NBMD: Float[Array, "N B M D"] | None = None
    """What each of the first N layers of the decoder adds to what stands in the text (DeepStack)."""
    kept: Patches | None = None
    """What a memory keeps of the vision tower."""
    means_BMD: Float[Array, "B M D"] | None = None
    """What stands in the text in place of the tokens, from slot 0 on; None: the tokens themselves."""
    places: int = dataclasses.field(default=1, metadata=dict(static=True))
    """As in `Views`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FormationInputs:
    """The states that a memory is formed from, each of the J times that it is, in a row. Constants: no gradient."""

    states_BJLD: Float[Array, "... B J L D"]
    """Visual states, then those of the text, without a gap."""
    lengths_BJ: Int32[Array, "... B J"]
    """How many of the L states there are."""
    kinds_BJ: Int32[Array, "... B J"]
    """Which kind of memory is formed; -1: none, its latent tokens mean nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache(State):
    """Rotated keys and values of every decoder layer, S slots a row; slot = index of the token in its row.

    Slots stand next to the numbers of a head, as attention reads them: with heads between, a TPU turns the whole cache
    round for every layer of every token, and pads few heads to its tiles.
    """

    k_LBKSC: Shaped[Array, "L B K S C"] = axes("layers", "batch", "kv_heads", "slots", "head_dim")
    v_LBKSC: Shaped[Array, "L B K S C"] = axes("layers", "batch", "kv_heads", "slots", "head_dim")
    k_scale_LBKS1: Float[Array, "L B K S 1"] | None = axes("layers", "batch", "kv_heads", "slots", None)
    v_scale_LBKS1: Float[Array, "L B K S 1"] | None = axes("layers", "batch", "kv_heads", "slots", None)
    """What the numbers of a head are multiples of, where they are kept in 8 bits. None: they are kept as they are."""

    @classmethod
    def empty(
        cls, layers: int, rows: int, capacity: int, kv_heads: int, head_dim: int, dtype, int8: bool = False
    ) -> "KVCache":
        """`int8`: keys and values are kept in 8 bits, and as `dtype` come out again."""
        shape = (layers, rows, kv_heads, capacity)
        numbers = [jnp.zeros((*shape, head_dim), jnp.int8 if int8 else dtype) for _ in "kv"]
        return cls(*numbers, *(jnp.zeros((*shape, 1), dtype) if int8 else None for _ in "kv"))

    def write(self, layer, k_BTKC, v_BTKC, index_BT=None) -> "KVCache":
        """Puts T tokens into one layer: at slots `index_BT` (those beyond the capacity are dropped), or from slot 0."""

        # each row by itself: a scatter whose indices name rows, too, gathers the tokens of all devices; jax.vmap would
        # turn the cache round
        by_row = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 3),
            inserted_window_dims=(0, 3),
            scatter_dims_to_operand_dims=(0, 3),
            operand_batching_dims=(1,),
            scatter_indices_batching_dims=(0,),
        )

        def put(cache_LBKSC, new_BTKC):
            new_BKTC = new_BTKC.swapaxes(1, 2).astype(cache_LBKSC.dtype)
            if index_BT is None:
                return jax.lax.dynamic_update_slice(cache_LBKSC, new_BKTC[None], (layer, 0, 0, 0, 0))
            place_BT2 = jnp.stack([jnp.full_like(index_BT, layer), index_BT], axis=-1)
            return jax.lax.scatter(cache_LBKSC, place_BT2, new_BKTC, by_row, unique_indices=True, mode="drop")

        if self.k_scale_LBKS1 is None:
            return KVCache(put(self.k_LBKSC, k_BTKC), put(self.v_LBKSC, v_BTKC), None, None)
        dtype = self.k_scale_LBKS1.dtype
        (k_BTKC, k_scale_BTK1), (v_BTKC, v_scale_BTK1) = (_in_8_bits(x, dtype) for x in (k_BTKC, v_BTKC))
        return KVCache(
            put(self.k_LBKSC, k_BTKC),
            put(self.v_LBKSC, v_BTKC),
            put(self.k_scale_LBKS1, k_scale_BTK1),
            put(self.v_scale_LBKS1, v_scale_BTK1),
        )

    def layer(self, layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, C] of one layer."""
        return self._read(lambda x_LBKSC: x_LBKSC[layer])

    def block(self, layer, start, size: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, P, K, C] of P = `size` slots of one layer."""

        def cut(x_LBKSC):
            sizes = 1, *x_LBKSC.shape[1:3], size, x_LBKSC.shape[4]
            return jax.lax.dynamic_slice(x_LBKSC, (layer, 0, 0, start, 0), sizes)[0]

        return self._read(cut)

    def _read(self, cut: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        def read(x_LBKSC, scale_LBKS1):
            x_BKPC = cut(x_LBKSC)
            if scale_LBKS1 is not None:
                x_BKPC = x_BKPC.astype(scale_LBKS1.dtype) * cut(scale_LBKS1)
            return x_BKPC.swapaxes(1, 2)

        return read(self.k_LBKSC, self.k_scale_LBKS1), read(self.v_LBKSC, self.v_scale_LBKS1)


def _in_8_bits(x_BTKC: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    """Whole numbers up to 127, and what they are multiples of."""
    most_BTK1 = jnp.abs(x_BTKC.astype(jnp.float32)).max(axis=-1, keepdims=True)
    scale_BTK1 = (jnp.maximum(most_BTK1, 1e-30) / 127).astype(dtype)
    whole_BTKC = jnp.round(x_BTKC.astype(jnp.float32) / scale_BTK1.astype(jnp.float32))
    return jnp.clip(whole_BTKC, -127, 127).astype(jnp.int8), scale_BTK1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState(State):
    """All that generation carries from token to token; a fixed-capacity pytree, donated at every step."""

    cache: KVCache
    length_B: Int32[Array, "B"] = axes("batch")
    """Tokens in the cache: the slot of the next one."""
    position_B: Int32[Array, "B"] = axes("batch")
    """Rotary position of the next token."""
    frequencies_BR: Float32[Array, "B R"] = axes("batch", None)
    """Rotary frequencies of the row, fixed where its first token is read (dynamic NTK depends on the length)."""
    memory: State | None = None
    """What the memory carries."""
    empty: bool = dataclasses.field(default=False, metadata=dict(static=True))
    """Whether nothing has been read yet, known when a program is traced: there is no cache to attend to."""
