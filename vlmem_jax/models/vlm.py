"""The vision-language model as pure functions of a parameter tree.

    pixels -> vision tower -> projector --+--> spliced into the tokens -> decoder -> logits
                                          |                                  ^
                                          +--> memory ---- door ATTEND ------+
                                                  +------- door SPEAK: latent tokens beside those of the text

Modules are defined with Flax NNX and merged with plain arrays inside each function, so everything here goes through
jax.jit, grad and scan as any function of pytrees does.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int32

from vlmem_jax.compiler import once
from vlmem_jax.decoder import Decoder
from vlmem_jax.memory import MEMORIES, Decode, Memory, Patches, Read, Speech, TokenStart, VisualTokens
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.nn.attention import same_segment
from vlmem_jax.nn.linear import held_dtype
from vlmem_jax.nn.rope import dynamic_theta, frequencies, rotation
from vlmem_jax.sharding import constrain
from vlmem_jax.types import Batch, DecodeState, Heard, KVCache, TileShape
from vlmem_jax.vision import InternViT, Merger, Projector, QwenViT, QwenViTConfig, normalise

Params = dict[str, Any]
"""Nested dict of arrays; layers of one kind are stacked on a leading axis."""


class _Modules(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.vision, self.projector = _tower(config, rngs)
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.memory = make_memory(config, rngs)
        if speech := speech_of(config):
            self.memory.adopt(TokenStart.of(*self.decoder.tables(), speech.start_id), rngs.params())


def _tower(config: ModelConfig, rngs: nnx.Rngs) -> tuple[nnx.Module, nnx.Module]:
    """Vision tower and projector."""
    c, width = config.vision, config.decoder.width
    if isinstance(c, QwenViTConfig):
        return (
            QwenViT(c, config.attention, rngs=rngs),
            Merger(c.merge**2, c.width, width, c.norm_eps, rngs=rngs),
        )
    return InternViT(c, config.attention, rngs=rngs), Projector(config.projector, c.width, width, rngs=rngs)


def make_memory(config: ModelConfig, rngs: nnx.Rngs) -> Memory | None:
    """The memory of a model alone."""
    if config.memory == "none":
        return None
    parts = config.decoder, config.vision, config.attention
    return MEMORIES[config.memory](getattr(config, config.memory), *parts, rngs=rngs)


def speech_of(config: ModelConfig) -> Speech | None:
    """How the memory of a model breaks into answers, if it does."""
    return None if config.memory == "none" else MEMORIES[config.memory].speech(getattr(config, config.memory))


@functools.lru_cache(maxsize=8)
def _graph(config: ModelConfig) -> tuple[Any, nnx.State]:
    """The graph that nnx.merge takes, and the shapes of the parameters; a command makes several VLMs of one config."""
    return nnx.split(nnx.eval_shape(lambda: _Modules(config, rngs=nnx.Rngs(0))))


@dataclasses.dataclass(frozen=True)
class VLM:
    """A model without its parameters: hashable, so that it can be a static argument of jax.jit."""

    config: ModelConfig

    @property
    def _graph(self) -> tuple[Any, nnx.State]:
        return _graph(self.config)

    def _merge(self, params: Params) -> _Modules:
        """The modules with kernels in the compute dtype, and other parameters as they are, cast where they are used.

        Kernels are cast before the loops over layers, which so gather, and give back as gradients, half the bytes. Each
        use gives its gradient as one product; those of other parameters are sums over tokens.
        """

        def cast(path: tuple, leaf: jax.Array) -> jax.Array:
            return leaf.astype(self.dtype) if path[-1].key == "kernel" else leaf

        return nnx.merge(self._graph[0], jax.tree.map_with_path(cast, params))

    @property
    def dtype(self):
        return jnp.dtype(self.config.compute_dtype)

    @property
    def tile(self) -> TileShape:
        """What the vision tower takes at a time."""
        return self.config.vision.tile

    @property
    def tokens_per_tile(self) -> int:
        return self.tile.tokens

    @property
    def speech(self) -> Speech | None:
        """How the memory breaks into answers, if it does."""
        return speech_of(self.config)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of tokens that the memory has of its own, which a tokenizer must know, by their text."""
        return self.speech.tokens if self.speech else {}

    # --- parameters ---------------------------------------------------------------------------------------------------

    def abstract(self) -> Params:
        """Shapes of the parameters, as jax.ShapeDtypeStruct in fp32."""
        return nnx.to_pure_dict(self._graph[1])

    def axes(self) -> dict[str, Any]:
        """The same tree with the meaning of each axis (see `sharding.LOGICAL_AXES`), leading stack axes left out."""
        flat = {path: leaf.get_metadata()["axes"] for path, leaf in nnx.to_flat_state(self._graph[1])}
        return nnx.traversals.unflatten_mapping(flat)

    def held(self, shardings: Params) -> Params:
        """Shapes of the parameters where nothing trains them, in the dtypes of `held_dtype`."""
        axes = flatten_dict(self.axes(), sep="/")

        def leaf(path: str, x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, held_dtype(path, axes[path], self.dtype), sharding=sharding)

        shapes, places = (flatten_dict(tree, sep="/") for tree in (self.abstract(), shardings))
        return unflatten_dict({path: leaf(path, x, places[path]) for path, x in shapes.items()}, sep="/")

    def init(self, key: jax.Array) -> Params:
        """Random fp32 parameters, as a function to be compiled: see `fresh`."""
        return nnx.to_pure_dict(nnx.state(_Modules(self.config, rngs=nnx.Rngs(key))))

    def fresh(self, key: jax.Array, held: Params | None = None) -> Params:
        """Random parameters on the devices, in the dtypes and shardings of `held` (default: fp32, unsharded)."""
        target = self.abstract() if held is None else held

        def make(key: jax.Array) -> Params:
            return jax.tree.map(lambda x, t: jnp.asarray(x, t.dtype), self.init(key), target)

        shardings = jax.tree.map(lambda t: t.sharding, target)
        return jax.jit(make, out_shardings=shardings, compiler_options=once())(key)

    def rates(self) -> dict[str, np.ndarray]:
        """By what the learning rate of some parameters is multiplied, row by row: path -> factors."""
        c = self.config
        rates = {} if c.memory == "none" else MEMORIES[c.memory].rates(getattr(c, c.memory))
        return {f"memory/{path}": factors for path, factors in rates.items()}

    def metrics(self, params: Params) -> dict[str, jax.Array]:
        """Scalars that the memory wants plotted, in fp32."""
        memory = nnx.merge(self._graph[0], params).memory
        return memory.metrics() if memory else {}

    # --- forward ------------------------------------------------------------------------------------------------------

    def encode_images(
        self,
        params: Params,
        pixels_BISSc: Array,
        key: jax.Array | None = None,
        layout_BI4: Int32[Array, "B I 4"] | None = None,
    ) -> Float[Array, "B M D"]:
        """Visual tokens of all tiles of each row, M = I * P. uint8 pixels are normalised; floats already are.

        With a key, the tower drops paths as in training. `layout_BI4` as in `Batch`.
        """
        return self._encode(self._merge(params), pixels_BISSc, key, layout_BI4)[0]

    def _encode(
        self, modules: _Modules, pixels_BISSc: Array, key: jax.Array | None, layout_BI4: Array | None = None
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B N E"] | None]:
        """Visual tokens, and the patches that the memory reads, if it does."""
        c, policy = self.config.vision, self.config.vision_remat or self.config.remat
        B, I, *tile = pixels_BISSc.shape
        if pixels_BISSc.dtype == jnp.uint8:
            pixels_BISSc = normalise(pixels_BISSc, c.channels(c.pixel_mean), c.channels(c.pixel_std), self.dtype)
        pixels_BISSc = pixels_BISSc.astype(self.dtype)
        first, kept_BNE = modules.memory.vision_layer if modules.memory else None, None
        if first is not None:
            patches, kept_BNE = modules.vision.keeping(pixels_BISSc, layout_BI4, first, policy)
        elif layout_BI4 is not None:
            patches = modules.vision(pixels_BISSc, layout_BI4, remat_policy=policy)
        else:
            tiles = constrain(pixels_BISSc.reshape(B * I, *tile), "parts", None, None, None)
            patches = modules.vision(tiles, drop_path_key=key, remat_policy=policy)
        tokens_BMD = modules.projector(patches).reshape(B, I * self.tokens_per_tile, -1)
        return constrain(tokens_BMD, "batch", "tokens", None), kept_BNE

    def _embed(self, modules: _Modules, tokens_BT: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        x_BTD = modules.decoder.embeddings(tokens_BT, self.dtype)
        return modules.memory.embed(tokens_BT, x_BTD) if modules.memory else x_BTD

    def _score(self, modules: _Modules, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        logits_BTV = modules.decoder.logits(hidden_BTD)
        return modules.memory.score(hidden_BTD, logits_BTV) if modules.memory else logits_BTV

    def _decode(self, modules: _Modules) -> Decode:
        """The decoder as a memory may call it."""

        def decode(x_BTD, positions_BT, segments_BT, lora):
            x_BTD = constrain(x_BTD, "batch", "tokens", None)
            tables = rotation(positions_BT, self._frequencies(segments_BT))
            return modules.decoder(x_BTD, tables, segments_BT, lora=lora, remat_policy=self.config.remat)[0]

        return decode

    def _read(self, modules: _Modules, patches: Patches, samples_BJ: Int32[Array, "B J"]) -> Read:
        """The last layers of the vision tower as a memory may call them, which speaks in these samples of each row."""
        c, policy = self.config.vision, self.config.vision_remat or self.config.remat
        sees_BJN = jnp.repeat(same_segment(samples_BJ, patches.segments_BI), c.merge**2, axis=2)

        def read(rows_BJFE, out, lora):
            B, J, F, _ = rows_BJFE.shape
            time_E = jnp.arange(J * F) // F
            own_BEE = jnp.broadcast_to(time_E[:, None] == time_E, (B, J * F, J * F))
            allowed_BES = jnp.concatenate([jnp.repeat(sees_BJN, F, axis=1), own_BEE], axis=2)
            # constants, as what was heard
            kept = jax.lax.stop_gradient(patches.x_BNE), patches.layout_BI4
            rows = rows_BJFE.reshape(B, J * F, -1), allowed_BES, lora
            read_BED = modules.vision.beside(*kept, *rows, modules.memory.vision_layer, policy)
            last_BED = read_BED.reshape(B, J, F, -1)[:, :, F - out :].reshape(B, J * out, -1)
            latents_BJND = modules.projector(last_BED).reshape(B, J, -1, self.config.decoder.width)
            # as in a batch without patches, whatever else is in this one
            return jnp.where(sees_BJN.any(-1)[..., None, None], latents_BJND, 0)

        return read

    def _splice(
        self,
        modules: _Modules,
        batch: Batch,
        features_BMD: Array | None,
        patches: Patches | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Token embeddings with each placeholder replaced by its visual or latent token."""
        x_BTD = self._embed(modules, batch.tokens_BT)
        slots_BMD = [] if features_BMD is None else [features_BMD]
        if batch.heard is not None:
            read = None
            if patches is not None:
                time_BT = (batch.slots_BT - features_BMD.shape[1]) // self.speech.slots  # below 0: none
                is_its_BJT = time_BT[:, None] == jnp.arange(batch.heard.kinds_BJ.shape[1])[:, None]
                samples_BJ = jnp.where(is_its_BJT, batch.segments_BT[:, None], 0).max(axis=-1)
                read = self._read(modules, patches, samples_BJ)
            latents_BJND = modules.memory.form(batch.heard, self._decode(modules), key, read)
            slots_BMD.append(latents_BJND.reshape(len(x_BTD), -1, x_BTD.shape[2]))
        if not slots_BMD:
            return x_BTD
        slots_BMD = jnp.concatenate(slots_BMD, axis=1) if len(slots_BMD) > 1 else slots_BMD[0]
        placed_BTD = jnp.take_along_axis(slots_BMD, jnp.maximum(batch.slots_BT, 0)[..., None], axis=1)
        return jnp.where((batch.slots_BT >= 0)[..., None], placed_BTD, x_BTD)

    def _frequencies(self, segments_BT: Int32[Array, "B T"]) -> Float[Array, "B #T R"]:
        """Rotary frequencies of each token: those of its sample's length, whatever else is in the row."""
        c, (B, T) = self.config.decoder, segments_BT.shape
        if not c.ntk_factor or c.max_positions >= T:
            return jnp.broadcast_to(frequencies(c.head_dim, c.rope_theta), (B, 1, c.head_dim // 2))
        sizes_BT = jax.vmap(lambda segments_T: jnp.bincount(segments_T, length=T + 1)[segments_T])(segments_BT)
        lengths_BT = jnp.where(segments_BT > 0, sizes_BT, 0)
        theta_BT = dynamic_theta(lengths_BT, c.rope_theta, c.ntk_factor, c.max_positions, c.head_dim)
        return frequencies(c.head_dim, theta_BT)

    def outgrown(self, read: int, length: int) -> bool:
        """Whether a sample of `length` tokens needs other rotary frequencies than when its first `read` were read."""
        c = self.config.decoder
        return c.ntk_factor > 0 and length > max(read, c.max_positions)

    def _run(self, modules: _Modules, batch: Batch, key: jax.Array | None, cache: KVCache | None):
        """Hidden states of whole rows, and all that decoding needs afterwards."""
        # a batch without tile slots has no vision tower and no memory in its program
        seeing = batch.pixels_BISSc.shape[1] > 0
        features_BMD = patches = None
        if seeing:
            features_BMD, kept_BNE = self._encode(modules, batch.pixels_BISSc, key, batch.layout_BI4)
            if kept_BNE is not None:
                patches = Patches(kept_BNE, batch.layout_BI4, batch.memory_segments_BM)
        x_BTD = self._splice(modules, batch, features_BMD, patches, key)
        frequencies_BTR = self._frequencies(batch.segments_BT)
        between, seen = None, None
        if modules.memory and features_BMD is not None:
            seen = VisualTokens(features_BMD, batch.memory_positions_BM, batch.memory_segments_BM)
            if cache is not None:
                seen = modules.memory.recall(seen)
            between = modules.memory.attend(seen, batch.positions_BT, batch.segments_BT)
        tables = rotation(batch.positions_BT, frequencies_BTR, self.config.decoder.rope_sections)
        hidden_BTD, cache = modules.decoder(
            x_BTD, tables, batch.segments_BT, between=between, cache=cache, remat_policy=self.config.remat
        )
        return hidden_BTD, x_BTD, cache, frequencies_BTR[:, 0], seen, patches

    def hidden(self, params: Params, batch: Batch, key: jax.Array | None = None) -> Float[Array, "B T D"]:
        """States after the final norm, in the compute dtype; the head turns them into logits, see `head_kernel`."""
        return self._run(self._merge(params), batch, key, cache=None)[0]

    def head_kernel(self, params: Params) -> Float[Array, "D V"]:
        """Without what a memory has of its own: see `rescore`."""
        decoder = params["decoder"]
        return decoder["embed"].T if self.config.decoder.tied else decoder["head"]["kernel"]

    def score(self, params: Params, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """fp32 scores of every token after states of `hidden`."""
        return self._score(self._merge(params), hidden_BTD)

    def rescore(
        self, params: Params, hidden_BTD: Float[Array, "B T D"], logits_BTV: Float[Array, "B T V"]
    ) -> Float[Array, "B T V"]:
        """What `head_kernel` makes of `hidden`, with the scores of the memory's own tokens in place."""
        memory = self._merge(params).memory
        return memory.score(hidden_BTD, logits_BTV) if memory else logits_BTV

    def logits(self, params: Params, batch: Batch) -> Float[Array, "B T V"]:
        """fp32 scores of every token at every position. Large: for tests and small models."""
        modules = self._merge(params)
        return self._score(modules, self._run(modules, batch, None, cache=None)[0])

    # --- generation ---------------------------------------------------------------------------------------------------

    def prefill(self, params: Params, batch: Batch, capacity: int) -> tuple[Float[Array, "B V"], DecodeState]:
        """Reads prompts of one segment a row; scores of the token after each, and the state to go on from.

        `capacity`: tokens that each row of the cache can hold, prompt included.
        """
        c = self.config.decoder
        B, T = batch.tokens_BT.shape
        if capacity < T:
            raise ValueError(f"the cache must hold the prompts of {T} token slots, got a capacity of {capacity}")
        modules = self._merge(params)
        cache = KVCache.empty(c.layers, B, capacity, c.kv_heads, c.head_dim, self.dtype)
        cache = jax.tree.map(lambda x: constrain(x, None, "batch", None, "kv_heads", None), cache)
        hidden_BTD, x_BTD, cache, frequencies_BR, recalled, patches = self._run(modules, batch, None, cache)
        length_B = (batch.segments_BT > 0).sum(-1, dtype=jnp.int32)
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        used = jnp.where((batch.segments_BT > 0)[..., None], batch.positions_BT.reshape(B, T, -1), -1)
        position_B = used.max(axis=(1, 2)) + 1
        last_B1D = jnp.take_along_axis(hidden_BTD, last_B1[..., None], axis=1)
        by_length = self.config.memory == "comemo" and self.config.comemo.decode_position == "length"
        state = DecodeState(
            cache=cache,
            length_B=length_B,
            position_B=position_B,
            memory_position_B=length_B if by_length else position_B,
            frequencies_BR=frequencies_BR,
            recalled=recalled,
            listening=modules.memory.listen(batch, x_BTD, hidden_BTD, last_B1D[:, 0]) if modules.memory else None,
            patches=patches,
        )
        return self._score(modules, last_B1D)[:, 0], state

    def form(
        self, params: Params, state: DecodeState, rows_R: Int32[Array, "R"], kinds_R: Int32[Array, "R"], size: int
    ) -> tuple[Float[Array, "R N D"], Heard]:
        """Latent tokens of `kinds_R` for some of the rows, which have just called for them, and from what they were
        formed. The texts that they heard have at most `size` states."""
        modules = self._merge(params)
        heard = modules.memory.heard(state.listening, rows_R, kinds_R, size)
        read = None
        if state.patches is not None:
            patches = jax.tree.map(lambda leaf: leaf.at[rows_R].get(mode="clip"), state.patches)
            read = self._read(modules, patches, jnp.ones_like(heard.kinds_BJ))
        return modules.memory.form(heard, self._decode(modules), read=read)[:, 0], heard

    def extend(
        self,
        params: Params,
        state: DecodeState,
        tokens_BT: Int32[Array, "B T"],
        counts_B: Int32[Array, "B"],
        latents_BND: Float[Array, "B N D"] | None = None,
        latent_counts_B: Int32[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], DecodeState]:
        """Appends the first `counts_B` of T tokens to each row; scores of the token after the last one.

        T = 1 is a decoding step. A row with count 0 is left as it was and its scores mean nothing. In place of its
        first `latent_counts_B` tokens a row takes as many of N <= T latent ones.
        """
        modules = self._merge(params)
        T, capacity = tokens_BT.shape[1], state.cache.k_LBSKC.shape[2]
        offsets_T = jnp.arange(T, dtype=jnp.int32)
        real_BT = offsets_T < counts_B[:, None]
        index_BT = jnp.where(real_BT, state.length_B[:, None] + offsets_T, capacity + offsets_T)
        segments_BT = real_BT.astype(jnp.int32)
        between = None
        if modules.memory and state.recalled is not None:
            memory_positions_BT = state.memory_position_B[:, None] + offsets_T
            between = modules.memory.attend(state.recalled, memory_positions_BT, segments_BT)
        x_BTD = self._embed(modules, tokens_BT)
        if latents_BND is not None:
            N = latents_BND.shape[1]
            is_latent_BN = offsets_T[:N] < latent_counts_B[:, None]
            x_BTD = x_BTD.at[:, :N].set(
                jnp.where(is_latent_BN[..., None], latents_BND.astype(self.dtype), x_BTD[:, :N])
            )
        tables = rotation(state.position_B[:, None] + offsets_T, state.frequencies_BR[:, None])
        hidden_BTD, cache = modules.decoder(
            x_BTD, tables, segments_BT, between=between, cache=state.cache, cache_index_BT=index_BT
        )
        last_B11 = jnp.maximum(counts_B - 1, 0)[:, None, None]
        last_B1D = jnp.take_along_axis(hidden_BTD, last_B11, axis=1)
        listening = state.listening
        if modules.memory:
            listening = modules.memory.follow(listening, last_B1D[:, 0], counts_B, anew=T > 1)
        state = dataclasses.replace(
            state,
            cache=cache,
            listening=listening,
            length_B=state.length_B + counts_B,
            position_B=state.position_B + counts_B,
            memory_position_B=state.memory_position_B + counts_B,
        )
        return self._score(modules, last_B1D)[:, 0], state
