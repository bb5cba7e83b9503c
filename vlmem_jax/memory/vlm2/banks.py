"""Two banks of frames (VLM^2 sec. 3.3, algorithm 1): the newest as they were seen, and episodes that are kept for good.

A frame reads both before it is written to both. Keys and values of what is kept are computed once, when it is written.
They lie as the attention kernel reads them, entry after entry, in parts that it holds at once; filled slots of a bank
are always its first ones. So a frame is written in place, and no bank is ever copied.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from kernels_pallas.memory_attention.blocks import up
from vlmem_jax.memory.vlm2.config import VLM2Config
from vlmem_jax.memory.vlm2.represent import split_heads, zero_started
from vlmem_jax.nn.attention import AttentionConfig, bank_attention, bank_parts
from vlmem_jax.nn.linear import Linear, biased, param, zeros
from vlmem_jax.nn.mlp import GeluMLP
from vlmem_jax.trees import State, axes

TILE_ROWS = 16
"""Of bf16 that lie together in the memory of a TPU."""
AGES = 16
"""Powers of two that ages are told apart by; the last is that of all older frames."""
EMPTY = -1
"""Time of a slot that holds nothing."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank(State):
    """What is read of L frames of N patches each. A part X holds equally many frames, and perhaps unused slots behind
    them, see `attention.bank_parts`; D: heads, side by side."""

    k_BXMD: Float[Array, "B X M D"] = axes("batch", None, "slots", None)
    v_BXMD: Float[Array, "B X M D"] = axes("batch", None, "slots", None)
    time_BL: Int32[Array, "B L"] = axes("batch", "slots")
    """When the frame was taken, counted from 0; EMPTY: the slot holds none."""

    @property
    def filled_BL(self) -> Bool[Array, "B L"]:
        return self.time_BL > EMPTY

    @property
    def entries(self) -> int:
        """Frames of a part."""
        return -(-self.time_BL.shape[1] // self.k_BXMD.shape[1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Banks(State):
    """Both banks, and the frames of the episodes themselves. Filled slots of the episodes are the first ones."""

    working: Bank
    episodes: Bank
    frames_BLMD: Float[Array, "B L M D"] = axes("batch", "slots", None, None)
    """Of N patches, and perhaps unused rows behind them: a TPU writes whole tiles of rows."""
    means_BLD: Float[Array, "B L D"] = axes("batch", "slots", None)
    """Of the tokens of each, fp32: what the choice of a slot depends on is rounded nowhere."""
    count_B: Int32[Array, "B"] = axes("batch")
    """Frames taken."""
    room_B: Int32[Array, "B"] = axes("batch")
    """Slots of the episodes that are used."""
    patches: int = dataclasses.field(metadata=dict(static=True))
    """N."""

    @property
    def frames_BLND(self) -> Float[Array, "B L N D"]:
        return self.frames_BLMD[:, :, : self.patches]


class Recall(nnx.Module):
    """Attention of a frame's patches to all patches of a bank."""

    def __init__(self, config: VLM2Config, width: int, attention: AttentionConfig, *, rngs: nnx.Rngs):
        self.attention = attention
        heads, self.residual = split_heads(config, width), config.residual
        self.q, self.k, self.v = (Linear({"embed": width}, heads, bias=True, rngs=rngs) for _ in range(3))
        self.o = zero_started(Linear(heads, {"embed": width}, bias=True, rngs=rngs))
        self.age = param(zeros, (AGES, width), ("positions", "embed"), rngs) if config.age_embed else None

    def __call__(self, x_BND: Float[Array, "B N D"], bank: Bank, now_B: Int32[Array, "B"]) -> Float[Array, "B N D"]:
        """What is read, with the frame of time `now` or alone; the frame itself where the bank is empty (eq. 5)."""
        if not bank.time_BL.shape[1]:
            return x_BND
        parts_X, N = jnp.arange(bank.k_BXMD.shape[1]), x_BND.shape[1]
        count_B1 = bank.filled_BL.sum(-1, keepdims=True, dtype=jnp.int32)
        valid_BX = N * jnp.clip(count_B1 - bank.entries * parts_X, 0, bank.entries)
        keys_BXMD = bank.k_BXMD if self.age is None else self._aged(bank, now_B, N)
        read_BND = self.o(bank_attention(self.attention, self.q(x_BND), keys_BXMD, bank.v_BXMD, valid_BX))
        read_BND = x_BND + read_BND if self.residual else read_BND
        return jnp.where(bank.filled_BL.any(-1)[:, None, None], read_BND, x_BND)

    def _aged(self, bank: Bank, now_B: Int32[Array, "B"], patches: int) -> Float[Array, "B X M D"]:
        """Keys with the age of the frame that each is of."""
        parts, slots = bank.k_BXMD.shape[1:3]
        ages_BL = jnp.maximum(now_B[:, None] - bank.time_BL, 1)
        powers_BL = jnp.minimum(31 - jax.lax.clz(ages_BL), AGES - 1)
        entry_XM = jnp.arange(parts)[:, None] * bank.entries + jnp.arange(slots) // patches
        entry_XM = jnp.minimum(entry_XM, ages_BL.shape[1] - 1)  # unused slots are those of any
        return biased(bank.k_BXMD, self.age[...][powers_BL][:, entry_XM])


class DualMemory(nnx.Module):
    """Working memory, episodes, and the gate between what is read of the two."""

    def __init__(
        self, config: VLM2Config, width: int, attention: AttentionConfig = AttentionConfig(), *, rngs: nnx.Rngs
    ):
        self.config, self.width = config, width
        self.mem_w, self.mem_e = (Recall(config, width, attention, rngs=rngs) for _ in range(2))
        outputs = width if config.gamma == "channel" else 1
        self.gamma = GeluMLP(2 * width, config.gamma_width or width, outputs, rngs=rngs)

    def begin(self, rows: int, patches: int, dtype: jax.typing.DTypeLike, key: jax.Array | None = None) -> Banks:
        """Banks that hold nothing. With a key, as in training, rows have room for as many episodes as are drawn."""
        config = self.config

        def bank(frames: int) -> Bank:
            # arrays of their own, which are donated
            keys, values = (jnp.zeros((rows, *bank_parts(frames, patches), self.width), dtype) for _ in range(2))
            return Bank(keys, values, jnp.full((rows, frames), EMPTY, jnp.int32))

        frames = jnp.zeros((rows, config.episodic, up(patches, TILE_ROWS), self.width), dtype)
        means = jnp.zeros((rows, config.episodic, self.width), jnp.float32)
        room_B = jnp.full(rows, config.episodic, jnp.int32)
        if key is not None and config.train_episodic:
            room_B = jax.random.choice(key, jnp.array(config.train_episodic, jnp.int32), (rows,))
        none_B = jnp.zeros(rows, jnp.int32)
        return Banks(bank(config.working), bank(config.episodic), frames, means, none_B, room_B, patches)

    def take(
        self, banks: Banks, x_BND: Float[Array, "B N D"], valid_B: Bool[Array, "B"], fresh_B: Bool[Array, "B"]
    ) -> tuple[Float[Array, "B N D"], Banks]:
        """M of the next frame H of each row, and the banks after it. Where it is not `valid`, nothing is taken, and the
        frame comes out as it is; one that holds NaN or infinities is not taken, either. Where it is `fresh`, what was
        before is forgotten."""
        banks = forgotten(banks, fresh_B)
        read_w_BND = self.mem_w(x_BND, banks.working, banks.count_B)
        read_e_BND = self.mem_e(x_BND, banks.episodes, banks.count_B)
        mixed_BND = self.mix(read_w_BND, read_e_BND)
        seen_BND = jnp.where(valid_B[:, None, None], mixed_BND, x_BND)
        kept, made = (x_BND, seen_BND) if self.config.bptt else map(jax.lax.stop_gradient, (x_BND, seen_BND))
        # and so, whatever is written depends on what was read: else the compiler copies the ring to write it before
        valid_B &= jnp.isfinite(seen_BND).all((1, 2))
        now_B = jnp.where(valid_B, banks.count_B, EMPTY)
        working = banks.working
        if self.config.working:
            slot_B = now_B % self.config.working
            working = self._written(self.mem_w, working, kept, slot_B, now_B)
        episodes, frames_BLMD, means_BLD = banks.episodes, banks.frames_BLMD, banks.means_BLD
        if self.config.episodic:
            mean_BD = made.astype(jnp.float32).mean(1)
            slot_B = self.slot(banks, made, mean_BD)
            episodes = self._written(self.mem_e, episodes, made, slot_B, now_B)
            frames_BLMD = put(frames_BLMD, (slot_B,), made, valid_B)
            means_BLD = put(means_BLD, (slot_B,), mean_BD, valid_B)
        written = {"working": working, "episodes": episodes, "frames_BLMD": frames_BLMD, "means_BLD": means_BLD}
        return seen_BND, dataclasses.replace(banks, **written, count_B=banks.count_B + valid_B)

    def mix(self, read_w_BND: Float[Array, "B N D"], read_e_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """M of what was read of the two banks (eq. 6-7)."""
        gamma = self.gate(read_w_BND, read_e_BND)
        both = (gamma * read_w_BND.astype(jnp.float32), (1 - gamma) * read_e_BND.astype(jnp.float32))
        return sum(both).astype(read_w_BND.dtype)

    def gate(self, read_w_BND: Float[Array, "B N D"], read_e_BND: Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """Share of the working memory, fp32."""
        return jax.nn.sigmoid(self.gamma(jnp.concatenate([read_w_BND, read_e_BND], axis=-1)).astype(jnp.float32))

    def slot(self, banks: Banks, made_BND: Float[Array, "B N D"], mean_BD: Float[Array, "B D"]) -> Int32[Array, "B"]:
        """Of the episodes, the slot that a new frame goes to: a free one, or that of the frame it replaces (eq. 8)."""
        filled_BL, L = banks.episodes.filled_BL, self.config.episodic
        alike_BL = jnp.where(filled_BL, self.alike(banks, made_BND, mean_BD), -jnp.inf)
        replaced_B = alike_BL.argmax(-1)
        if self.config.write == "pair" and L > 1:
            pairs_BLL = cosine(banks.means_BLD[:, :, None], banks.means_BLD[:, None])
            counts_BLL = jnp.triu(jnp.ones((L, L), bool), 1) & filled_BL[:, None] & filled_BL[:, :, None]
            best_B = jnp.where(counts_BLL, pairs_BLL, -jnp.inf).reshape(len(filled_BL), -1).argmax(-1)
            one_B, other_B = best_B // L, best_B % L
            at = jnp.arange(len(best_B))
            older_B = jnp.where(banks.episodes.time_BL[at, one_B] < banks.episodes.time_BL[at, other_B], one_B, other_B)
            found_B = counts_BLL[at, one_B, other_B] & (pairs_BLL[at, one_B, other_B] > alike_BL.max(-1))
            replaced_B = jnp.where(found_B, older_B, replaced_B)
        count_B = filled_BL.sum(-1)
        return jnp.where(count_B >= banks.room_B, replaced_B, count_B).astype(jnp.int32)

    def alike(self, banks: Banks, made_BND: Float[Array, "B N D"], mean_BD: Float[Array, "B D"]) -> Float[Array, "B L"]:
        """Cosine of a new frame with each of the episodes, fp32."""
        if self.config.similarity == "pooled":
            return cosine(banks.means_BLD, mean_BD[:, None])
        flat_BLX = banks.frames_BLND.astype(jnp.float32).reshape(*banks.frames_BLND.shape[:2], -1)
        return cosine(flat_BLX, made_BND.astype(jnp.float32).reshape(len(made_BND), 1, -1))

    def readout(self, banks: Banks) -> tuple[Float[Array, "B L N D"], Int32[Array, "B L"]]:
        """The frames of the episodes, oldest first, and when each was taken; empty slots, of time EMPTY, are last."""
        time_BL = banks.episodes.time_BL
        order_BL = jnp.argsort(jnp.where(time_BL > EMPTY, time_BL, jnp.iinfo(jnp.int32).max), axis=-1)
        frames_BLND = jnp.take_along_axis(banks.frames_BLND, order_BL[..., None, None], axis=1)
        return frames_BLND, jnp.take_along_axis(time_BL, order_BL, axis=1)

    def _written(
        self, recall: Recall, bank: Bank, x_BND: Float[Array, "B N D"], slot_B: Int32[Array, "B"], now_B: Array
    ) -> Bank:
        """The bank with a frame in a slot of each row; `now` EMPTY: none."""
        valid_B, patches = now_B > EMPTY, x_BND.shape[1]
        keys, values = (linear(x_BND).reshape(x_BND.shape) for linear in (recall.k, recall.v))
        part_B, first_B = slot_B // bank.entries, slot_B % bank.entries * patches
        return Bank(
            put(bank.k_BXMD, (part_B, first_B), keys, valid_B),
            put(bank.v_BXMD, (part_B, first_B), values, valid_B),
            put(bank.time_BL, (slot_B,), now_B, valid_B),
        )


def forgotten(banks: Banks, fresh_B: Bool[Array, "B"]) -> Banks:
    """Banks that hold nothing in `fresh` rows; what lies in an empty slot means nothing."""

    def empty(bank: Bank) -> Bank:
        return dataclasses.replace(bank, time_BL=jnp.where(fresh_B[:, None], EMPTY, bank.time_BL))

    return dataclasses.replace(
        banks,
        working=empty(banks.working),
        episodes=empty(banks.episodes),
        count_B=jnp.where(fresh_B, 0, banks.count_B),
    )


def put(bank: Array, place: tuple[Int32[Array, "B"], ...], x: Array, valid_B: Bool[Array, "B"]) -> Array:
    """The bank [B, ...] with `x` of each row in it, where that is valid, from `place` on: along the first axes after
    that of rows. First axes that `x` lacks are those along which it is a single entry."""
    beyond = jnp.where(valid_B, 0, bank.shape[1])  # what lies outside is dropped
    lacking = bank.ndim - x.ndim
    by_row = jax.lax.ScatterDimensionNumbers(  # a scatter whose indices name rows would gather the banks of all devices
        update_window_dims=tuple(range(1, x.ndim)),
        inserted_window_dims=tuple(range(1, 1 + lacking)),
        scatter_dims_to_operand_dims=tuple(range(1, 1 + len(place))),
        operand_batching_dims=(0,),
        scatter_indices_batching_dims=(0,),
    )
    place_BI = jnp.stack([place[0] + beyond, *place[1:]], axis=-1)
    return jax.lax.scatter(bank, place_BI, x.astype(bank.dtype), by_row, unique_indices=True, mode="drop")


def cosine(x: Float[Array, "... D"], y: Float[Array, "... D"]) -> Float[Array, "..."]:
    """The cosine of vectors, which lie along the last axes."""
    sizes = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / (sizes + 1e-12)
