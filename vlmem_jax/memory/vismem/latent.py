"""VisMem (arXiv 2511.11007): latent memory tokens, formed and inserted while an answer is written.

The model calls for a short or a long memory by a token of the vocabulary. A query builder reads the states of the
images and of the text since the last call; a former turns its queries into latent tokens, which stand in the sequence
as embeddings. The model's own weights stay as they are.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32

from vlmem_jax.config import to_dict
from vlmem_jax.decoder import DecoderConfig
from vlmem_jax.memory.base import Decode, Memory, Speech, ThroughTower, TokenStart
from vlmem_jax.memory.vismem.config import VisMemConfig
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.nn.embedding import look_up
from vlmem_jax.nn.encoder import Encoder
from vlmem_jax.nn.linear import Linear, ones, param, spread
from vlmem_jax.nn.lora import Adapters, LoRA, LoRAConfig
from vlmem_jax.nn.stack import stack
from vlmem_jax.records import Rule, own_tensors
from vlmem_jax.runtime.sharding import constrain
from vlmem_jax.trees import Flat, State, axes
from vlmem_jax.types import FormationInputs, Patches, Text, VisualTokens
from vlmem_jax.vision import QwenViTConfig

TOKENS = "<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>"
"""Invoke and end, short and long."""
KEY = "vismem_config"
"""Of config.json; what stands there are our own keys. Nobody has published a checkpoint."""
ROWS_NOISE = 1e-3
"""Standard deviation of what the rows of special tokens start apart by."""
ATTENTION_BLOCK = 128
"""Long sequences of a former are padded to a multiple of it, which attention kernels ask for."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observed(State):
    """What a former may read, of each row. Text states lie in a ring: state n in slot n % Z."""

    visual_BYD: Float[Array, "B Y D"] = axes("batch", None, None)
    visual_length_B: Int32[Array, "B"] = axes("batch")
    text_BZD: Float[Array, "B Z D"] = axes("batch", None, None)
    """States that tokens were chosen from, since the prompt or the last call."""
    count_B: Int32[Array, "B"] = axes("batch")
    """So many have been put into the ring."""
    last_BD: Float[Array, "B D"] = axes("batch", None)
    """State of the newest token, from which the next one is chosen: not in the ring yet."""
    patches: Patches | None = None
    """What formers read of the row's images inside the vision tower."""


class QueryBuilder(nnx.Module):
    """Learned queries that read all states, which do not see them (VisMem eq. 9-11)."""

    def __init__(self, config: VisMemConfig, width: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.position_std)
        self.normed = config.normed_states
        self.q_init = param(init, (config.query_len, width), ("slots", "embed"), rngs)
        self.pos_emb = param(init, (config.max_positions, width), ("positions", "embed"), rngs)
        self.encoder = Encoder(config.query_builder, width, rngs=rngs)

    def __call__(self, states_BLD: Float[Array, "B L D"], lengths_B: Int32[Array, "B"]) -> Float[Array, "B K D"]:
        """Of the first `lengths_B` states. Queries take the positions that follow them, whatever the padding.

        Raises ValueError if there are more states than positions.
        """
        L, K, positions = states_BLD.shape[1], self.q_init.shape[0], self.pos_emb.shape[0]
        if positions < L + K:
            raise ValueError(
                f"{L} states and {K} queries need as many positions, but there are {positions}; raise "
                "memory.max_positions"
            )
        if self.normed:
            states_BLD = rescaled(states_BLD, jnp.ones(len(states_BLD)))
        positions_BK = lengths_B[:, None] + jnp.arange(K)
        shape, dtype = (len(states_BLD), K, states_BLD.shape[2]), states_BLD.dtype
        queries_BKD = spread(self.q_init[...], shape, dtype) + self.pos_emb[...][positions_BK].astype(dtype)
        states_BLD += spread(self.pos_emb[:L], states_BLD.shape, dtype)
        x_BTD = jnp.concatenate([states_BLD, queries_BKD], axis=1)
        is_query_T = jnp.arange(L + K) >= L
        real_BT = is_query_T | (jnp.arange(L + K) < lengths_B[:, None])
        allowed_BTS = real_BT[:, None, :] & (is_query_T[:, None] | ~is_query_T)
        return self.encoder(x_BTD, allowed_BTS)[:, L:]


class Former(nnx.Module):
    """What one kind of memory has of its own: learned slots, and an adapter of the decoder or an encoder."""

    def __init__(self, config: VisMemConfig, slots: int, decoder: DecoderConfig, *, rngs: nnx.Rngs):
        self.m_init = param(nnx.initializers.normal(0.02), (slots, decoder.width), ("slots", "embed"), rngs)
        self.gain = param(ones, (1,), ("scalar",), rngs) if config.memory_output == "rescaled" else None
        if config.former == "tiny_transformer":
            self.encoder = Encoder(config.tiny, decoder.width, rngs=rngs)
        else:
            maps = decoder.linear_maps
            self.lora = stack(lambda rngs: LoRA(config.lora, maps, rngs=rngs), decoder.layers, rngs)


class VisionFormer(nnx.Module):
    """What short memories have of their own under lora_vision: a map of queries into the vision tower, learned slots
    there, as many a latent token as the projector merges, and an adapter of its last layers."""

    def __init__(self, config: VisMemConfig, decoder: DecoderConfig, vision: QwenViTConfig, *, rngs: nnx.Rngs):
        slots, init = config.short_len * vision.merge**2, nnx.initializers.normal(0.02)
        self.m_init = param(init, (slots, vision.width), ("slots", "embed"), rngs)
        self.query = Linear({"embed": decoder.width}, {"channels": vision.width}, rngs=rngs)
        self.gain = param(ones, (1,), ("scalar",), rngs) if config.memory_output == "rescaled" else None
        layers = vision.layers - config.vision_layer
        self.lora = stack(lambda rngs: LoRA(vision_lora(config), vision.linear_maps, rngs=rngs), layers, rngs)


def vision_lora(config: VisMemConfig) -> LoRAConfig:
    """That of the vision tower."""
    return dataclasses.replace(config.lora, targets=("q", "v"))


class VisMem(Memory):
    """Query builder, formers, and the rows of the four tokens."""

    config_type = VisMemConfig

    def __init__(
        self, config: VisMemConfig, decoder: DecoderConfig, vision: Any, attention: AttentionConfig, *, rngs: nnx.Rngs
    ):
        if max(*config.token_ids, config.start_id) >= decoder.vocab:
            raise ValueError(
                f"memory.token_ids and memory.start_id must be below decoder.vocab {decoder.vocab}, got "
                f"{config.token_ids} and {config.start_id}"
            )
        self.config = config
        self.query_builder = QueryBuilder(config, decoder.width, rngs=rngs)
        if config.former == "lora_vision":
            if not vision.tile.layout or not 0 <= config.vision_layer < vision.layers:
                raise ValueError(
                    "memory.former lora_vision needs a tower whose tiles see each other "
                    f"and memory.vision_layer below vision.layers, got {vision.kind} and {config.vision_layer} of "
                    f"{vision.layers}"
                )
            self.vision_layer = config.vision_layer
            self.short = VisionFormer(config, decoder, vision, rngs=rngs)
        else:
            self.short = Former(config, config.short_len, decoder, rngs=rngs)
        self.long = Former(config, config.long_len, decoder, rngs=rngs)
        init = nnx.initializers.normal(0.02)
        self.special_in = param(init, (4, decoder.width), ("slots", "embed"), rngs)
        self.special_out = param(init, (4, decoder.width), ("slots", "embed"), rngs)
        self.invoke_logit_bias = param(nnx.initializers.constant(config.invoke_bias), (1,), ("scalar",), rngs)

    def adopt(self, start: TokenStart, key: jax.Array) -> None:
        """Rows of special tokens start from those of a full stop, gains from the size of embeddings."""
        pairs = (self.special_in, start.embedding_D), (self.special_out, start.scoring_D)
        for n, (rows, from_D) in enumerate(pairs):
            rows[...] = from_D + ROWS_NOISE * jax.random.normal(jax.random.fold_in(key, n), rows.shape)
        for former in (self.short, self.long):
            if former.gain is not None:
                former.gain[...] = start.rms[None]

    @classmethod
    def reads_beyond(cls, config: VisMemConfig) -> bool:
        return config.former == "lora_vision" or config.visual_states == "all"

    @classmethod
    def speech(cls, config: VisMemConfig) -> Speech:
        ids, tokens = config.token_ids, dict(zip(TOKENS, config.token_ids, strict=True))
        limits = config.max_invocations, config.max_prompt_hidden, config.max_visual_hidden
        return Speech(config.kinds, ids[::2], ids[1::2], config.lengths, *limits, config.start_id, tokens)

    @classmethod
    def rates(cls, config: VisMemConfig) -> dict[str, np.ndarray]:
        rows = np.array([[1.0], [config.end_rate]] * 2)
        return {"special_in": rows, "special_out": rows}

    @classmethod
    def formation_flops(
        cls, config: VisMemConfig, decoder: DecoderConfig, states: int, trained: Collection[str]
    ) -> int:
        """Of the longer kind. Adapters, which are little, are left out, as is the share of lora_vision in the vision
        tower; small formers are counted once a kind, since all of them run."""
        queried = states + config.query_len
        T = queried + max(config.lengths)
        encoders = [config.query_builder.flops(decoder.width, queried)]
        through = 0, 0
        if config.former == "tiny_transformer":
            encoders += [config.tiny.flops(decoder.width, T)] * len(config.lengths)
        else:
            through = decoder.flops(T)
        gradient = any(path.startswith(("query_builder", "short", "long")) for path in trained)
        decoded = through[0] * (1 + gradient) + through[1] * (1 + 2 * gradient)
        return decoded + sum(map(sum, encoders)) * (1 + 2 * gradient)

    @classmethod
    def tensors(cls, config: VisMemConfig, decoder: DecoderConfig, leaves: Flat, layer: str) -> list[Rule]:
        return own_tensors("vismem", leaves)

    @classmethod
    def read_config(cls, content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
        return content.get(KEY)

    @classmethod
    def write_config(cls, config: VisMemConfig, decoder: DecoderConfig) -> dict[str, Any]:
        return {KEY: to_dict(config)}

    # --- the tokens ---------------------------------------------------------------------------------------------------

    def embed(self, tokens_BT: Int32[Array, "B T"], x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        match_BTN = tokens_BT[..., None] == jnp.array(self.config.token_ids)
        rows_BTD = look_up(self.special_in[...], match_BTN.argmax(-1), x_BTD.dtype, "slots")
        return jnp.where(match_BTN.any(-1)[..., None], rows_BTD, x_BTD)

    def score(self, hidden: Float[Array, "... D"], logits: Float[Array, "... V"]) -> Float[Array, "... V"]:
        rows_ND = self.special_out[...].astype(hidden.dtype)
        scores = jnp.einsum("...D,ND->...N", hidden, rows_ND, preferred_element_type=jnp.float32)
        scores += jnp.array([1.0, 0.0, 1.0, 0.0]) * self.invoke_logit_bias[...].astype(jnp.float32)
        return logits.at[..., jnp.array(self.config.token_ids)].set(scores)

    # --- what it observes ---------------------------------------------------------------------------------------------

    def observe_prompt(
        self,
        text: Text,
        x_BTD: Float[Array, "B T D"],
        hidden_BTD: Float[Array, "B T D"],
        last_BD: Float[Array, "B D"],
        visual: VisualTokens | None,
    ) -> Observed:
        B, T, D = x_BTD.shape
        slots = 0 if visual is None else visual.segments_BM.shape[1]
        if self.config.visual_states == "llm_hidden_first_span":
            visual_BYD, length_B = kept(hidden_BTD, self._first_span(text.tokens_BT), self._most(T))
        elif self.config.visual_states == "vision_encoder" or visual is None:
            visual_BYD, length_B = kept(x_BTD, text.visual_index_BT >= 0, self._most(slots))
        else:
            seen_BMD = visual.tokens_BMD.astype(x_BTD.dtype)
            visual_BYD, length_B = kept(seen_BMD, visual.segments_BM > 0, self._most(slots))
        text_BZD = jnp.zeros((B, self.config.max_prompt_hidden, D), x_BTD.dtype)
        visual_BYD, text_BZD = (constrain(states, "batch", None, None) for states in (visual_BYD, text_BZD))
        patches = None if visual is None else visual.kept
        return Observed(visual_BYD, length_B, text_BZD, jnp.zeros(B, jnp.int32), last_BD, patches)

    def _most(self, tokens: int) -> int:
        return min(tokens, self.config.max_visual_hidden)

    def _first_span(self, tokens_BT: Int32[Array, "B T"]) -> Array:
        start, end = (tokens_BT == token for token in self.config.span_ids)
        index_T = jnp.arange(tokens_BT.shape[1])
        within = (index_T >= start.argmax(-1)[:, None]) & (index_T <= end.argmax(-1)[:, None])
        return within & (start.any(-1) & end.any(-1))[:, None]

    def observe_tokens(
        self, state: Observed, last_BD: Float[Array, "B D"], counts_B: Int32[Array, "B"], reset: bool
    ) -> Observed:
        moved_B, Z = counts_B > 0, state.text_BZD.shape[1]
        last_BD = jnp.where(moved_B[:, None], last_BD, state.last_BD)
        if reset:
            return dataclasses.replace(state, count_B=jnp.where(moved_B, 0, state.count_B), last_BD=last_BD)
        slot_B = jnp.where(moved_B, state.count_B % Z, Z)
        text_BZD = put_states(state.text_BZD, slot_B, state.last_BD)
        return dataclasses.replace(state, text_BZD=text_BZD, count_B=state.count_B + moved_B, last_BD=last_BD)

    def formation_inputs(
        self, state: Observed, rows_R: Int32[Array, "R"], kinds_R: Int32[Array, "R"], size: int
    ) -> tuple[FormationInputs, Patches | None]:
        """The newest token, which made the call, is part of what is read."""
        chosen = jax.tree.map(lambda leaf: leaf.at[rows_R].get(mode="clip"), state)
        Z, Y = chosen.text_BZD.shape[1], chosen.visual_BYD.shape[1]
        size = min(size, Z)
        text_RZD = put_states(chosen.text_BZD, chosen.count_B % Z, chosen.last_BD)
        total_R1, visual_R1 = chosen.count_B[:, None] + 1, chosen.visual_length_B[:, None]
        texts_R1 = jnp.minimum(total_R1, size)
        index_L = jnp.arange(Y + size)
        ring_RL = Y + (total_R1 - texts_R1 + index_L - visual_R1) % Z
        index_RL = jnp.where(index_L < visual_R1, index_L, ring_RL)
        states_RLD = jnp.take_along_axis(
            jnp.concatenate([chosen.visual_BYD, text_RZD], axis=1), index_RL[..., None], axis=1
        )
        lengths_R = (visual_R1 + texts_R1)[:, 0]
        inputs = FormationInputs(states_RLD[:, None], lengths_R[:, None], kinds_R[:, None])
        return inputs, chosen.patches

    # --- what it says -------------------------------------------------------------------------------------------------

    def form(
        self,
        inputs: FormationInputs,
        decode: Decode,
        key: jax.Array | None = None,
        through_tower: ThroughTower | None = None,
    ) -> Float[Array, "B J N D"]:
        B, J, L, D = inputs.states_BJLD.shape
        states_RLD = jax.lax.stop_gradient(inputs.states_BJLD.reshape(B * J, L, D))
        lengths_R, kinds_R = inputs.lengths_BJ.reshape(-1), jnp.maximum(inputs.kinds_BJ.reshape(-1), 0)
        queries_RKD = self.query_builder(states_RLD, lengths_R)
        of_states = states_RLD, lengths_R, queries_RKD, decode, key
        if self.config.former == "lora_vision":
            each = (
                self._from_patches(queries_RKD.reshape(B, J, -1, D), through_tower, key).reshape(B * J, -1, D),
                self._from_states((self.long,), jnp.zeros_like(kinds_R), *of_states),
            )
            slots = max(self.config.lengths)
            padded = (jnp.pad(x_RND, ((0, 0), (0, slots - x_RND.shape[1]), (0, 0))) for x_RND in each)
            latents_RND = jnp.where((kinds_R == 0)[:, None, None], *padded)
        else:
            latents_RND = self._from_states((self.short, self.long), kinds_R, *of_states)
        if self.config.memory_output == "rescaled":
            gains_R = jnp.stack([former.gain[...] for former in (self.short, self.long)])[kinds_R, 0]
            latents_RND = rescaled(latents_RND, gains_R)
        return latents_RND.reshape(B, J, -1, D)

    def _from_states(
        self,
        formers: tuple[Former, ...],
        index_R: Array,
        states_RLD: Array,
        lengths_R: Array,
        queries_RKD: Array,
        decode: Decode,
        key: jax.Array | None,
    ) -> Float[Array, "R N D"]:
        """By the decoder, or by small encoders, from states, queries and slots: row r by `formers[index_R[r]]`."""
        L, inits = states_RLD.shape[1], [former.m_init[...] for former in formers]
        counts_A = jnp.array([len(init) for init in inits])
        slots = max(len(init) for init in inits)
        inits = [jnp.pad(init, ((0, slots - len(init)), (0, 0))) for init in inits]
        slots_RND = jnp.stack(inits)[index_R].astype(states_RLD.dtype)
        x_RTD = jnp.concatenate([states_RLD, queries_RKD, slots_RND], axis=1)
        real_RT = jnp.concatenate(
            [
                jnp.arange(L) < lengths_R[:, None],
                jnp.ones(queries_RKD.shape[:2], bool),
                jnp.arange(slots) < counts_A[index_R][:, None],
            ],
            axis=1,
        )
        if self.config.former == "tiny_transformer":
            allowed_RTS = jnp.broadcast_to(real_RT[:, None], (len(x_RTD), *(x_RTD.shape[1],) * 2))
            each = [former.encoder(x_RTD, allowed_RTS) for former in formers]
            hidden_RTD = jnp.where((index_R == 0)[:, None, None], *each)
        else:
            adapters = Adapters.of([self.config.lora] * len(formers), [former.lora for former in formers], index_R, key)
            hidden_RTD = self._decode(x_RTD, real_RT, decode, adapters)
        return hidden_RTD[:, -slots:]

    def _from_patches(
        self, queries_BJKD: Float[Array, "B J K D"], through_tower: ThroughTower | None, key: jax.Array | None
    ) -> Float[Array, "B J N D"]:
        """By the vision tower, from patches, queries and slots; zeros where there are no patches.

        Its windows bound what patches see, not what queries and slots see: all patches of the sample.
        """
        (B, J, _, D), former = queries_BJKD.shape, self.short
        if through_tower is None:
            return jnp.zeros((B, J, self.config.short_len, D), queries_BJKD.dtype)
        queries_BJKE, slots_NE = former.query(queries_BJKD), former.m_init[...]
        slots_BJNE = spread(slots_NE, (B, J, *slots_NE.shape), queries_BJKE.dtype)
        key = None if key is None else jax.random.fold_in(key, 1)  # others than the decoder's
        adapters = Adapters.of([vision_lora(self.config)], [former.lora], key=key)
        return through_tower(jnp.concatenate([queries_BJKE, slots_BJNE], axis=2), len(slots_NE), adapters)

    def _decode(self, x_RTD: Array, real_RT: Array, decode: Decode, adapters: Adapters) -> Float[Array, "R T D"]:
        T = x_RTD.shape[1]
        short = -T % ATTENTION_BLOCK if T > ATTENTION_BLOCK else 0
        x_RTD, real_RT = jnp.pad(x_RTD, ((0, 0), (short, 0), (0, 0))), jnp.pad(real_RT, ((0, 0), (short, 0)))
        segments_RT = real_RT.astype(jnp.int32)
        positions_RT = jnp.maximum(jnp.cumsum(segments_RT, axis=1) - 1, 0)
        return decode(x_RTD, positions_RT, segments_RT, adapters)


@jax.vmap  # a scatter whose indices name rows would gather the states of all devices
def put_states(ring_ZD: Float[Array, "Z D"], slot: Int32[Array, ""], state_D: Float[Array, "D"]) -> Float[Array, "Z D"]:
    """The ring with a state in its slot; slot Z: nowhere."""
    return ring_ZD.at[slot].set(state_D, mode="drop")


def kept(x_BTD: Float[Array, "B T D"], chosen_BT: Array, most: int) -> tuple[Float[Array, "B Y D"], Int32[Array, "B"]]:
    """The chosen rows of x from slot 0 on, Y = `most` slots, and how many there are.

    Where they are more, means of as few consecutive ones as it takes.
    """
    number_B1 = chosen_BT.sum(-1, keepdims=True, dtype=jnp.int32)
    group_B1 = jnp.maximum(-(-number_B1 // max(most, 1)), 1)
    slot_BT = jnp.where(chosen_BT, (jnp.cumsum(chosen_BT, axis=-1, dtype=jnp.int32) - 1) // group_B1, most)
    empty_YD = jnp.zeros((most, x_BTD.shape[2]), jnp.float32)
    add = jax.vmap(lambda slot_T, x_TD: empty_YD.at[slot_T].add(x_TD, mode="drop"))
    sums_BYD = add(slot_BT, x_BTD.astype(jnp.float32))
    sizes_BY = jnp.clip(number_B1 - jnp.arange(most) * group_B1, 1, group_B1)
    length_B = (-(-number_B1 // group_B1))[:, 0] if most else jnp.zeros(len(x_BTD), jnp.int32)
    return (sums_BYD / sizes_BY[..., None]).astype(x_BTD.dtype), length_B


def rescaled(x_RND: Float[Array, "R N D"], gains_R: Float[Array, "R"]) -> Float[Array, "R N D"]:
    """x with rows of root mean square `gains_R`."""
    x32 = x_RND.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-12)
    return (normed * gains_R.astype(jnp.float32)[:, None, None]).astype(x_RND.dtype)
