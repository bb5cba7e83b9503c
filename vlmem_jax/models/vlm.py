"""The vision-language model as pure functions of a parameter tree: see, read, extend.

    pixels -> vision tower -> projector --+--> spliced into the tokens -> decoder -> logits
                                          |                                  ^
                                          +--> memory ---- door ATTEND ------+
                                                  +------- door SPEAK: latent tokens beside those of the text

    see(params, views) -> visual tokens                         any time, once for many uses
    read(params, text, visual) -> hidden                        training: whole packed rows, no cache
    extend(params, state, text, visual) -> hidden, state        anything with a cache, from an empty one on

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
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.decoder import Decoder, Tap
from vlmem_jax.decoder.frequencies import of_lengths, tables_of
from vlmem_jax.memory import Attend, Decode, Frame, Memory, See, Speak, Speech, ThroughTower, TokenStart, memory_of
from vlmem_jax.models.adapters import chosen_adapters, make_adapters
from vlmem_jax.models.config import ModelConfig
from vlmem_jax.models.looking import in_turn
from vlmem_jax.models.visual import deep_tap, visual_tokens
from vlmem_jax.nn.attention import same_segment
from vlmem_jax.nn.linear import held_dtype
from vlmem_jax.nn.lora import Adapters
from vlmem_jax.nn.rope import rotation
from vlmem_jax.runtime.compiler import once
from vlmem_jax.runtime.sharding import constrain, gathered, lay_out
from vlmem_jax.trees import State, flatten, unflatten
from vlmem_jax.types import Batch, DecodeState, FormationInputs, KVCache, Patches, Text, TileShape, Views, VisualTokens
from vlmem_jax.vision import TOWERS, Levels, normalise

Params = dict[str, Any]
"""Nested dict of arrays; layers of one kind are stacked on a leading axis."""


class _Modules(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        tower, width = TOWERS[config.vision.kind], config.decoder.width
        self.vision = tower.tower(config.vision, config.attention, rngs=rngs)
        self.projector = tower.projector(config.vision, config.projector, width, rngs=rngs)
        self.decoder = Decoder(config.decoder, rngs=rngs)
        self.memory = make_memory(config, rngs)
        self.adapters = make_adapters(config, rngs)
        if speech := speech_of(config):
            self.memory.adopt(TokenStart.of(*self.decoder.tables(), speech.start_id), rngs.params())


def make_memory(config: ModelConfig, rngs: nnx.Rngs) -> Memory | None:
    """The memory of a model alone."""
    if config.memory is None:
        return None
    return memory_of(config.memory)(config.memory, config.decoder, config.vision, config.attention, rngs=rngs)


def speech_of(config: ModelConfig) -> Speech | None:
    """How the memory of a model breaks into answers, if it does."""
    return memory_of(config.memory).speech(config.memory)


@functools.lru_cache(maxsize=8)
def _graph(config: ModelConfig) -> tuple[Any, nnx.State]:
    """The graph that nnx.merge takes, and the shapes of the parameters; a command makes several VLMs of one config."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: _Modules(config, rngs=nnx.Rngs(0))))
    # kept for callers on any mesh: no shape names the mesh that was set when the first one asked
    return graph, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


@dataclasses.dataclass(frozen=True)
class VLM:
    """A model without its parameters: hashable, so that it can be a static argument of jax.jit."""

    config: ModelConfig
    adapter: int = 0
    """Number of the adapter, of those that there are, that rows go through by default; below 0: none."""

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

    def _for_frames(self, memory: See) -> See:
        """The memory for a loop over frames, each of which takes all of it."""
        graph, state = nnx.split(memory)
        return nnx.merge(graph, gathered(nnx.to_pure_dict(state), self.axes()["memory"]))

    @property
    def dtype(self):
        return jnp.dtype(self.config.compute_dtype)

    @property
    def tile(self) -> TileShape:
        """What the vision tower takes at a time, and what the memory reads beside it."""
        reads = memory_of(self.config.memory).geometry_read(self.config.memory, self.config.vision)
        return self.config.vision.tile._replace(geometry=reads)

    def tile_of(self, image: Any) -> TileShape:
        """`tile` with this config of images. Raises ValueError where other frames are to stand in the sequence than the
        memory keeps."""
        tile, keeps = (
            image.shows(self.tile, self.reads_beyond),
            memory_of(self.config.memory).frames_kept(self.config.memory),
        )
        if tile.keeps not in (0, keeps):
            rule = f"must be kept:{keeps}, or memory.episodic another," if keeps else "must be all or stride:n"
            raise ValueError(f"image.context {rule} for model.memory {self.config.memory_kind}, got kept:{tile.keeps}")
        return tile

    @property
    def tokens_per_tile(self) -> int:
        return self.tile.tokens

    @property
    def speech(self) -> Speech | None:
        """How the memory breaks into answers, if it does."""
        return speech_of(self.config)

    @property
    def late_views(self) -> bool:
        """Whether images may come after text that has been read."""
        return self.config.memory is None or memory_of(self.config.memory).late_views

    @property
    def reads_beyond(self) -> bool:
        """Whether something reads visual tokens, or patches, that do not stand in the text."""
        return memory_of(self.config.memory).reads_beyond(self.config.memory)

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
        axes = flatten(self.axes())

        def leaf(path: str, x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, held_dtype(path, axes[path], self.dtype), sharding=sharding)

        shapes, places = map(flatten, (self.abstract(), shardings))
        return unflatten({path: leaf(path, x, places[path]) for path, x in shapes.items()})

    def init(self, key: jax.Array) -> Params:
        """Random fp32 parameters, as a function to be compiled: see `fresh`."""
        made = nnx.to_pure_dict(nnx.state(_Modules(self.config, rngs=nnx.Rngs(key))))
        if not (starts := memory_of(self.config.memory).starts(self.config.memory, self.config.decoder)):
            return made
        flat = flatten(made)
        layers = {path: flat[f"decoder/layers/{start.path}"] for path, start in starts.items()}
        return unflatten(flat | {f"memory/{path}": start.of(layers[path]) for path, start in starts.items()})

    def fresh(self, key: jax.Array, held: Params | None = None) -> Params:
        """Random parameters on the devices, in the dtypes and shardings of `held`, which may be some of them (default:
        all in fp32, unsharded)."""
        target = self.abstract() if held is None else held

        def make(key: jax.Array) -> Params:
            made = flatten(self.init(key))
            return unflatten({path: jnp.asarray(made[path], t.dtype) for path, t in flatten(target).items()})

        shardings = jax.tree.map(lambda t: t.sharding, target)
        return jax.jit(make, out_shardings=shardings, compiler_options=once())(key)

    def rates(self) -> dict[str, np.ndarray]:
        """Per-row learning-rate multipliers, by parameter path."""
        rates = memory_of(self.config.memory).rates(self.config.memory)
        return {f"memory/{path}": factors for path, factors in rates.items()}

    def metrics(self, params: Params) -> dict[str, jax.Array]:
        """Scalars that the memory wants plotted, in fp32."""
        memory = nnx.merge(self._graph[0], params).memory
        return memory.metrics() if memory else {}

    # --- see ----------------------------------------------------------------------------------------------------------

    def see(
        self,
        params: Params,
        views: Views,
        key: jax.Array | None = None,
        adapter_B: Int32[Array, "B"] | None = None,
    ) -> VisualTokens | None:
        """The visual tokens of all tiles of each row, M = I * P. None of rows without tile slots, whose program has no
        vision tower.

        uint8 pixels are normalised; floats already are. With a key, the tower drops paths as in training. `adapter_B`:
        the adapter of each row, below 0: none; by default, that of the VLM.
        """
        if not views.pixels_BISSc.shape[1]:
            return None
        modules = self._merge(params)
        policy, layout_BI4 = self.config.vision_remat or self.config.remat, views.layout_BI4
        pixels_BISSc = views.pixels_BISSc
        B, I, *tile = pixels_BISSc.shape
        pixels_BISSc = self._normalised(pixels_BISSc)
        first, kept, is_seen = modules.memory.vision_layer if modules.memory else None, None, False
        if layout_BI4 is None and adapter_B is not None:
            adapter_B = jnp.repeat(adapter_B, I)  # of each tile
        lora = self._adapters(modules, "vision", adapter_B, key)
        if first is not None:
            features, kept_BNE = modules.vision.keeping(pixels_BISSc, layout_BI4, first, policy, lora)
            kept = Patches(kept_BNE, layout_BI4, views.segments_BM)
        elif layout_BI4 is not None:
            features = modules.vision(pixels_BISSc, layout_BI4, lora=lora, remat_policy=policy)
        else:
            tiles = constrain(pixels_BISSc.reshape(B * I, *tile), "parts", None, None, None)
            features = modules.vision(tiles, drop_path_key=key, lora=lora, remat_policy=policy)
            if is_seen := isinstance(modules.memory, See):
                features = self._to_door(modules, features)
                frames_BIND = features.reshape(B, I, *features.shape[1:])
                segments_BI = views.segments_BM[:, :: self.tokens_per_tile]
                how = {"geometry": views.geometry, "kept_first": views.kept_first}
                if key is not None:
                    how["key"] = jax.random.fold_in(key, 1)  # of the tower's draws it is itself
                frames_BIND = in_turn(self._for_frames(modules.memory), frames_BIND, segments_BI, **how)
                features = frames_BIND.reshape(features.shape)
        deep_NBMD = None
        if isinstance(features, Levels):
            features, levels_NBPD = features
            deep_NBMD = constrain(modules.projector.deep(levels_NBPD), None, "batch", "tokens", None)
        tokens = self._from_door(modules, features) if is_seen else modules.projector(features)
        tokens_BMD = tokens.reshape(B, I * self.tokens_per_tile, -1)
        tokens_BMD = constrain(tokens_BMD, "batch", "tokens", None)
        return visual_tokens(tokens_BMD, views, deep_NBMD, kept)

    def _normalised(self, pixels: Array) -> Float[Array, "..."]:
        """Pixels as the tower takes them: uint8 is normalised, floats already are."""
        c = self.config.vision
        if pixels.dtype == jnp.uint8:
            pixels = normalise(pixels, c.channels(c.pixel_mean), c.channels(c.pixel_std), self.dtype)
        return pixels.astype(self.dtype)

    def _to_door(self, modules: _Modules, features: Float[Array, "B P D"]) -> Float[Array, "B N E"]:
        """Features of frames as they come to the door SEE."""
        behind = memory_of(self.config.memory).behind_projector(self.config.memory)
        return modules.projector.projected(features) if behind else features

    def _from_door(self, modules: _Modules, frames: Float[Array, "B N E"]) -> Float[Array, "B P D"]:
        """The visual tokens of frames as they come from the door SEE."""
        behind = memory_of(self.config.memory).behind_projector(self.config.memory)
        return modules.projector.lined(frames) if behind else modules.projector(frames)

    # --- see, frame by frame ------------------------------------------------------------------------------------------

    def watch(self, params: Params, rows: int) -> State:
        """What is kept of `rows` streams of which nothing was seen yet. Raises ValueError for a memory that is not at
        the door SEE."""
        memory = self._merge(params).memory
        if not isinstance(memory, See):
            raise ValueError(
                f"a stream of frames needs a memory that keeps them; model.memory is {self.config.memory_kind}"
            )
        return memory.begin(rows, self.dtype)

    def look(self, params: Params, state: State, views: Views, fresh_B: Bool[Array, "B"] | None = None) -> State:
        """Takes the next frame of each stream, I = 1; padding leaves a stream as it is, `fresh` ones begin anew.

        The same function of the memory as in training, where `see` takes the frames of a clip one after the other.
        """
        return self.take(params, state, views, fresh_B)[2]

    def take(
        self, params: Params, state: State, views: Views, fresh_B: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B N D"], Bool[Array, "B"], State]:
        """What the model sees of the frame that `look` takes, and whether it was taken; one with a number that is not
        finite is not, as padding is not."""
        modules = self._merge(params)
        lora = self._adapters(modules, "vision", None)
        features = modules.vision(self._normalised(views.pixels_BISSc[:, 0]), lora=lora)
        x_BND = self._to_door(modules, features)
        geometry = None if views.geometry is None else jax.tree.map(lambda x: x[:, 0], views.geometry)
        valid_B = views.segments_BM[:, 0] > 0
        fresh_B = jnp.zeros_like(valid_B) if fresh_B is None else fresh_B
        made_BND, state = modules.memory.take(state, Frame(x_BND, geometry), valid_B, fresh_B)
        return made_BND, valid_B & jnp.isfinite(made_BND).all((1, 2)), state

    def kept(self, params: Params, state: State) -> Int32[Array, "B L"]:
        """Which frames of each stream are kept, by their numbers from 0, oldest first; -1, behind them: none."""
        return self._merge(params).memory.readout(state)[1]

    def recollect(self, params: Params, state: State) -> VisualTokens:
        """The visual tokens of what is kept of each stream, oldest first, for any number of questions."""
        modules, P = self._merge(params), self.tokens_per_tile
        frames_BLND, time_BL = modules.memory.readout(state)
        B, L = time_BL.shape
        tokens = self._from_door(modules, frames_BLND.reshape(B * L, *frames_BLND.shape[2:]))
        positions_BM = jnp.broadcast_to(jnp.arange(L * P, dtype=jnp.int32), (B, L * P))
        return VisualTokens(
            tokens.reshape(B, L * P, -1), positions_BM, jnp.repeat(time_BL >= 0, P, 1).astype(jnp.int32)
        )

    # --- read ---------------------------------------------------------------------------------------------------------

    def read(
        self,
        params: Params,
        text: Text,
        visual: VisualTokens | None = None,
        key: jax.Array | None = None,
        adapter_B: Int32[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """States of packed rows after the final norm, in the compute dtype; the head turns them into logits, see
        `head_kernel`. With a key, what forms latent tokens, and adapters, drop at random as in training. `adapter_B` as
        in `see`."""
        modules = self._merge(params)
        latents_BJND = None
        if text.formation is not None:
            latents_BJND = self._formed(modules, text, visual, key)
        x_BTD = self._spliced(modules, text, visual, latents_BJND)
        tables = tables_of(self.config.decoder, text.positions_BT, text.segments_BT)
        taps = self._taps(modules, visual, visual, text.positions_BT, text.samples_BT, text.visual_index_BT)
        lora = self._adapters(modules, "decoder", adapter_B, key)
        return modules.decoder(
            x_BTD,
            tables,
            text.segments_BT,
            prefix_BT=text.prefix_BT,
            taps=taps,
            lora=lora,
            remat_policy=self.config.remat,
        )[0]

    def hidden(
        self,
        params: Params,
        batch: Batch,
        key: jax.Array | None = None,
        adapter_B: Int32[Array, "B"] | None = None,
    ) -> Float[Array, "B T D"]:
        """`read` of what `see` sees."""
        visual = self.see(params, batch.views, key, adapter_B)
        return self.read(params, batch.text, visual, key, adapter_B)

    def logits(self, params: Params, batch: Batch) -> Float[Array, "B T V"]:
        """fp32 scores of every token at every position. Large: for tests and small models."""
        return self.score(params, self.hidden(params, batch))

    def head_kernel(self, params: Params) -> Float[Array, "D V"]:
        """Without what a memory has of its own: see `rescore`."""
        decoder = params["decoder"]
        return decoder["embed"].T if self.config.decoder.tied else decoder["head"]["kernel"]

    def score(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """fp32 scores of every token after states of `read` and `extend`."""
        return self.rescore(params, hidden, self._merge(params).decoder.logits(hidden))

    def rescore(
        self, params: Params, hidden: Float[Array, "... D"], logits: Float[Array, "... V"]
    ) -> Float[Array, "... V"]:
        """What `head_kernel` makes of states, with the scores of the memory's own tokens in place."""
        memory = self._merge(params).memory
        return memory.score(hidden, logits) if isinstance(memory, Speak) else logits

    # --- extend -------------------------------------------------------------------------------------------------------

    def begin(self, lengths_B: Int32[Array, "B"], capacity: int, int8: bool = False) -> DecodeState:
        """The state of rows in which nothing has been read yet, and each of which can hold `capacity` tokens; `int8` as
        in `KVCache`.

        `lengths_B`: tokens of the prompts, all chunks of them, by which rotary frequencies are chosen.
        """
        c, B = self.config.decoder, lengths_B.shape[0]
        zeros_B = jnp.zeros(B, jnp.int32)
        state = DecodeState(
            cache=KVCache.empty(c.layers, B, capacity, c.kv_heads, c.head_dim, self.dtype, int8),
            length_B=zeros_B,
            position_B=zeros_B,
            frequencies_BR=of_lengths(self.config.decoder, lengths_B[:, None], capacity)[:, 0],
            empty=True,
        )
        return lay_out(state)

    def extend(
        self,
        params: Params,
        state: DecodeState,
        text: Text,
        visual: VisualTokens | None = None,
        latents_BND: Float[Array, "B N D"] | None = None,
        adapter_B: Int32[Array, "B"] | None = None,
        used: Int32[Array, ""] | int | None = None,
        every: bool = False,
    ) -> tuple[Float[Array, "B *T D"], DecodeState]:
        """Appends the tokens of `text`, of one segment a row; the state (`hidden`) of the last one of each row, or of
        `every` one.

        A row without tokens is left as it was, and what comes out for it means nothing. A prompt may come in chunks,
        with its visual tokens at each; T = 1 is a decoding step. `latents_BND` follow the visual tokens; `adapter_B` as
        in `see`. `used`: no row fills more slots of the cache than so many, others are not read.
        """
        modules = self._merge(params)
        B, T = text.tokens_BT.shape
        real_BT, offsets_T = text.segments_BT > 0, jnp.arange(T, dtype=jnp.int32)
        counts_B = real_BT.sum(-1, dtype=jnp.int32)
        capacity = state.cache.k_LBKSC.shape[3]
        if capacity < T:
            raise ValueError(f"the cache must hold the prompts of {T} token slots, got a capacity of {capacity}")
        place_BT = state.length_B[:, None] + offsets_T
        index_BT = None if state.empty else jnp.where(real_BT, place_BT, capacity + offsets_T)
        goes_on = text.positions_BT is None
        positions_BT = state.position_B[:, None] + offsets_T if goes_on else text.positions_BT
        memory = state.memory
        if isinstance(modules.memory, Attend) and memory is None and visual is not None:
            memory = modules.memory.precompute(visual)
        x_BTD = self._spliced(modules, text, visual, latents_BND)
        taps = self._taps(
            modules, memory, visual, positions_BT, text.segments_BT, text.visual_index_BT, place_BT if goes_on else None
        )
        tables = rotation(positions_BT, state.frequencies_BR[:, None], self.config.decoder.rope_axes)
        lora = self._adapters(modules, "decoder", adapter_B)
        hidden_BTD, cache = modules.decoder(
            x_BTD,
            tables,
            text.segments_BT,
            taps=taps,
            cache=state.cache,
            cache_index_BT=index_BT,
            cache_used=used,
            lora=lora,
        )
        last_BD = jnp.take_along_axis(hidden_BTD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)[:, 0]
        if isinstance(modules.memory, Speak):
            if memory is None:
                memory = modules.memory.observe_prompt(text, x_BTD, hidden_BTD, last_BD, visual)
            else:
                memory = modules.memory.observe_tokens(memory, last_BD, counts_B, reset=T > 1)
        if goes_on:
            position_B = state.position_B + counts_B
        else:
            used = jnp.where(real_BT[..., None], positions_BT.reshape(B, T, -1), -1)
            position_B = jnp.maximum(used.max(axis=(1, 2)) + 1, state.position_B)
        state = dataclasses.replace(
            state, cache=cache, memory=memory, length_B=state.length_B + counts_B, position_B=position_B, empty=False
        )
        return hidden_BTD if every else last_BD, state

    def prefill(self, params: Params, batch: Batch, capacity: int) -> tuple[Float[Array, "B V"], DecodeState]:
        """Reads prompts of one segment a row at once; scores of the token after each, and the state to go on from."""
        state = self.begin((batch.text.segments_BT > 0).sum(-1, dtype=jnp.int32), capacity)
        hidden_BD, state = self.extend(params, state, batch.text, self.see(params, batch.views))
        return self.score(params, hidden_BD), state

    def outgrown(self, read: int, length: int) -> bool:
        """Whether a sample of `length` tokens needs other rotary frequencies than when its first `read` were read."""
        c = self.config.decoder
        return c.ntk_factor > 0 and length > max(read, c.max_positions)

    # --- form ---------------------------------------------------------------------------------------------------------

    def form(
        self, params: Params, state: DecodeState, rows_R: Int32[Array, "R"], kinds_R: Int32[Array, "R"], size: int
    ) -> tuple[Float[Array, "R N D"], FormationInputs]:
        """Latent tokens of `kinds_R` for some of the rows, which have just called for them, and from what they were
        formed. The texts that they were formed from have at most `size` states."""
        modules = self._merge(params)
        inputs, patches = modules.memory.formation_inputs(state.memory, rows_R, kinds_R, size)
        through = None
        if patches is not None:
            through = self._through_tower(modules, patches, jnp.ones_like(inputs.kinds_BJ))
        return modules.memory.form(inputs, self._decode(modules), through_tower=through)[:, 0], inputs

    def _formed(
        self, modules: _Modules, text: Text, visual: VisualTokens | None, key: jax.Array | None
    ) -> Float[Array, "B J N D"]:
        """The latent tokens that stand in packed rows."""
        through = None
        if visual is not None and visual.kept is not None:
            # below 0: none
            time_BT = (text.visual_index_BT - visual.tokens_BMD.shape[1]) // self.speech.latents
            is_its_BJT = time_BT[:, None] == jnp.arange(text.formation.kinds_BJ.shape[1])[:, None]
            samples_BJ = jnp.where(is_its_BJT, text.samples_BT[:, None], 0).max(axis=-1)
            through = self._through_tower(modules, visual.kept, samples_BJ)
        return modules.memory.form(text.formation, self._decode(modules), key, through)

    def _decode(self, modules: _Modules) -> Decode:
        """The decoder as a memory may call it."""

        def decode(x_BTD, positions_BT, segments_BT, lora):
            x_BTD = constrain(x_BTD, "batch", "tokens", None)
            tables = tables_of(self.config.decoder, positions_BT, segments_BT)
            return modules.decoder(x_BTD, tables, segments_BT, lora=lora, remat_policy=self.config.remat)[0]

        return decode

    def _through_tower(self, modules: _Modules, patches: Patches, samples_BJ: Int32[Array, "B J"]) -> ThroughTower:
        """The last layers of the vision tower as a memory may call them, which speaks in these samples of each row."""
        c, policy = self.config.vision, self.config.vision_remat or self.config.remat
        sees_BJN = jnp.repeat(same_segment(samples_BJ, patches.segments_BI), c.merge**2, axis=2)

        def through_tower(rows_BJFE, out, lora):
            B, J, F, _ = rows_BJFE.shape
            time_E = jnp.arange(J * F) // F
            own_BEE = jnp.broadcast_to(time_E[:, None] == time_E, (B, J * F, J * F))
            allowed_BES = jnp.concatenate([jnp.repeat(sees_BJN, F, axis=1), own_BEE], axis=2)
            # constants, as what was observed
            kept = jax.lax.stop_gradient(patches.x_BNE), patches.layout_BI4
            rows = rows_BJFE.reshape(B, J * F, -1), allowed_BES, lora
            read_BED = modules.vision.beside(*kept, *rows, modules.memory.vision_layer, policy)
            last_BED = read_BED.reshape(B, J, F, -1)[:, :, F - out :].reshape(B, J * out, -1)
            latents_BJND = modules.projector(last_BED).reshape(B, J, -1, self.config.decoder.width)
            # as in a batch without patches, whatever else is in this one
            return jnp.where(sees_BJN.any(-1)[..., None, None], latents_BJND, 0)

        return through_tower

    def _adapters(
        self, modules: _Modules, part: str, adapter_B: Int32[Array, "B"] | None, key: jax.Array | None = None
    ) -> Adapters | None:
        """What rows go through beside the weights of the decoder or the tower; None: nothing."""
        if modules.adapters is None:
            return None
        key = None if key is None else jax.random.fold_in(key, 2)
        return chosen_adapters(
            self.config, modules.adapters, part, self.adapter if adapter_B is None else adapter_B, key
        )

    # --- parts of these -----------------------------------------------------------------------------------------------

    def _spliced(
        self, modules: _Modules, text: Text, visual: VisualTokens | None, latents: Float[Array, "B *N D"] | None
    ) -> Float[Array, "B T D"]:
        """Token embeddings with each placeholder replaced by its visual or latent token."""
        x_BTD = modules.decoder.embeddings(text.tokens_BT, self.dtype)
        if isinstance(modules.memory, Speak):
            x_BTD = modules.memory.embed(text.tokens_BT, x_BTD)
        inputs_BMD = [] if visual is None else [visual.tokens_BMD if visual.means_BMD is None else visual.means_BMD]
        if latents is not None:
            inputs_BMD.append(latents.reshape(len(x_BTD), -1, x_BTD.shape[2]).astype(self.dtype))
        if not inputs_BMD:
            return x_BTD
        inputs_BMD = jnp.concatenate(inputs_BMD, axis=1) if len(inputs_BMD) > 1 else inputs_BMD[0]
        index_BT = text.visual_index_BT
        placed_BTD = jnp.take_along_axis(inputs_BMD, jnp.maximum(index_BT, 0)[..., None], axis=1)
        return jnp.where((index_BT >= 0)[..., None], placed_BTD, x_BTD)

    def _taps(
        self,
        modules: _Modules,
        seen: VisualTokens | State | None,
        visual: VisualTokens | None,
        positions_BT: Array,
        segments_BT: Int32[Array, "B T"],
        visual_index_BT: Int32[Array, "B T"] | None,
        index_BT: Int32[Array, "B T"] | None = None,
    ) -> list[Tap]:
        """What stands beside the decoder's layers: a memory's blocks, and what layers add to visual tokens."""
        taps = []
        if isinstance(modules.memory, Attend) and seen is not None:
            taps.append(modules.memory.attend(seen, positions_BT, segments_BT, index_BT))
        if visual is not None and visual.deep_NBMD is not None:
            taps.append(deep_tap(visual, visual_index_BT))
        return taps
