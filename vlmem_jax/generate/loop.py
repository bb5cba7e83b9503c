"""The generation loop: prefill once, then one compiled, donated step a token. The host reads tokens one step late.

A row that calls for a memory waits, on the device, until the host has seen the call: the memory is formed for the rows
that wait, and put behind their tokens with the token that ends it. To the other rows nothing happens meanwhile.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmem_jax.generate.invocation import Calls, Invocation, InvocationConfig, Rule, is_delimiter
from vlmem_jax.generate.prompts import like_sized, pad_prompts
from vlmem_jax.generate.sampling import Choice, SamplingConfig, choose, need
from vlmem_jax.memory import Speech
from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import Params
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import bucket
from vlmem_jax.runtime.sharding import batch_sharding, batch_shards, constrain, lay_out, put, replicate
from vlmem_jax.trees import repeat_rows, repeated
from vlmem_jax.types import Batch, DecodeState, FormationInputs, Sample, Text, TileShape, VisualTokens

FINISHED = -1
"""Stands for the token of a row that has stopped, or that has none this time."""

WAITING = -2
"""Within the loop, for the token of a row that waits for its memory."""

PREFILL_CHUNK = 32768
"""Tokens of a prompt that are read at once, by the kernel of causal attention; later chunks attend by XLA's loops."""

EXTENSION_BUCKET = 16
"""Smallest number of tokens appended to a conversation at once."""

FORMED_ROWS = 8
"""Rows whose memories are formed together; so many whether all of them wait or not."""

TEXT_BUCKET = 64
"""Smallest number of states of the text that a memory is formed from."""


class Programs(NamedTuple):
    """The programs of one model on one mesh, each compiled at its first call."""

    prefill: Callable
    """`prefill(params, batch, capacity, copies)`: whole prompts."""
    see: Callable
    """`see(params, views)`: what prompts show."""
    first: Callable
    """`first(params, text, visual, lengths_B, capacity)`: the first chunk of prompts whose visual tokens are there."""
    chunk: Callable
    """`chunk(params, state, logits_BV, text, visual, copies)`: a chunk that follows."""
    extend: Callable
    """`extend(params, state, text, views)`: what goes on from where rows stand, perhaps with views."""
    step: Callable
    """One token for each row."""


@functools.lru_cache(maxsize=8)
def compiled(vlm: VLM, mesh: Mesh | None) -> Programs:
    """The programs of a model on a mesh."""
    speech = vlm.speech

    def prefill(params, batch, capacity, copies=1):
        logits_BV, state = vlm.prefill(params, batch, capacity)
        return laid_out(logits_BV, state, copies)

    def first(params, text, visual, lengths_B, capacity):
        hidden_BD, state = vlm.extend(params, vlm.begin(lengths_B, capacity), text, visual)
        return laid_out(vlm.score(params, hidden_BD), state)

    def chunk(params, state, logits_BV, text, visual, copies):
        hidden_BD, state = vlm.extend(params, state, text, visual)
        ends_B = (text.segments_BT > 0).any(-1)
        return laid_out(jnp.where(ends_B[:, None], vlm.score(params, hidden_BD), logits_BV), state, copies)

    def extend(params, state, text, views=None):
        visual = None
        if views is not None:
            here = state.position_B.reshape(-1, *(1,) * (text.positions_BT.ndim - 1))
            text = dataclasses.replace(text, positions_BT=text.positions_BT + here)
            visual = vlm.see(params, views.moved(here))
        hidden_BD, state = vlm.extend(params, state, text, visual)
        return laid_out(vlm.score(params, hidden_BD), state)

    def step(params, state, logits_BV, finished_B, choice, needed, calls=None, rule=None, delimiter_V=None):
        if calls is not None:
            finished_B |= (calls.count_B >= rule.limit_B) & ~calls.waiting_B
        withheld_BV = None if calls is None else calls.withheld(speech, logits_BV.shape[1])
        tokens_B, logp_B = choose(logits_BV, choice, state.length_B, needed, withheld_BV)
        if calls is not None:
            given_B = calls.force(rule, delimiter_V, speech, choice.keys_B, state.length_B)
            tokens_B = jnp.where(given_B >= 0, given_B, tokens_B)
            logp_B = jnp.where(given_B >= 0, jnp.nan, logp_B)
            tokens_B = jnp.where(calls.waiting_B, WAITING, tokens_B)
        tokens_B = jnp.where(finished_B, FINISHED, tokens_B)
        finished_B |= choice.stops(tokens_B)
        counts_B = (~finished_B & (tokens_B >= 0)).astype(jnp.int32)
        logits_BV, state = extend(params, state, Text.first(tokens_B[:, None], counts_B))
        if calls is not None:
            calls = calls.take(rule, speech, tokens_B, counts_B)
        finished_B, tokens_B, logp_B = (constrain(x, "batch") for x in (finished_B, tokens_B, logp_B))
        # every host reads the tokens; the rest stays with its rows
        return state, logits_BV, finished_B, *replicate((tokens_B, logp_B)), calls and lay_out(calls)

    return Programs(
        jax.jit(prefill, static_argnums=(2, 3), compiler_options=options(mesh)),
        jax.jit(vlm.see, compiler_options=options(mesh)),
        jax.jit(first, static_argnums=4, compiler_options=options(mesh)),
        jax.jit(chunk, static_argnums=5, donate_argnums=(1, 2), compiler_options=options(mesh)),
        jax.jit(extend, donate_argnums=1, compiler_options=options(mesh)),
        jax.jit(step, donate_argnums=(1, 2, 3, 6), compiler_options=options(mesh)),
    )


def laid_out(logits_BV: jax.Array, state: DecodeState, copies: int = 1) -> tuple[jax.Array, DecodeState]:
    """Each row `copies` times, one after the other, over the ambient mesh as the axes of the state say."""
    if copies > 1:
        logits_BV, state = repeated(logits_BV, 0, copies), repeat_rows(state, copies)
    return constrain(logits_BV, "batch", "vocab"), lay_out(state)


@functools.lru_cache(maxsize=8)
def compiled_speech(vlm: VLM, mesh: Mesh | None):
    """form and insert of a model with a memory that speaks, on one mesh."""
    speech = vlm.speech

    def form(params, state, latents_BND, rows_R, kinds_R, size):
        """Puts the latent tokens of some rows into place."""
        latents_RND, inputs = vlm.form(params, state, rows_R, kinds_R, size)
        latents_BND = latents_BND.at[rows_R].set(latents_RND.astype(latents_BND.dtype), mode="drop")
        return replicate((latents_BND, inputs))

    def insert(params, state, logits_BV, calls, latents_BND, kinds_B):
        """Puts a memory of kinds_B and its end token behind each row; -1: nothing."""
        called_B, kinds_B = kinds_B >= 0, jnp.maximum(kinds_B, 0)
        lengths_B, ends_B = (jnp.array(of, jnp.int32)[kinds_B] for of in (speech.lengths, speech.end_ids))
        index_T = jnp.arange(speech.latents + 1, dtype=jnp.int32)
        tokens_BT = jnp.where(index_T == lengths_B[:, None], ends_B[:, None], 0)
        text = Text.first(tokens_BT, jnp.where(called_B, lengths_B + 1, 0))
        text = dataclasses.replace(text, visual_index_BT=jnp.where(index_T < lengths_B[:, None], index_T, -1))
        after_BD, state = vlm.extend(params, state, text, latents_BND=latents_BND)
        logits_BV = jnp.where(called_B[:, None], vlm.score(params, after_BD), logits_BV)
        logits_BV, state = laid_out(logits_BV, state)
        return state, logits_BV, lay_out(calls.answered(ends_B, called_B))

    return (
        jax.jit(form, static_argnums=5, donate_argnums=2, compiler_options=options(mesh)),
        jax.jit(insert, donate_argnums=(1, 2, 3), compiler_options=options(mesh)),
    )


class Generator:
    """A model with its parameters, ready to answer.

    `stop_ids` end an answer and are no part of it; `banned_ids` (control tokens that have a meaning as input only) are
    never chosen; after `delimiter_ids` chance may call for a memory, see `InvocationConfig`. `tile`: that of the
    processor of its prompts, by default the model's. With a `mesh`, parameters
    must be sharded over it; rows are split over it.
    """

    def __init__(
        self,
        vlm: VLM,
        params: Params,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        delimiter_ids: Sequence[int] = (),
        tile: TileShape | None = None,
        mesh: Mesh | None = None,
    ):
        self.vlm, self.tile = vlm, tile or vlm.tile
        self.params = params
        self.stop_ids = tuple(stop_ids)
        self.banned_ids = tuple(banned_ids)
        self.delimiter_ids = tuple(delimiter_ids)
        self.mesh = mesh
        self.programs = compiled(vlm, mesh)

    def context(self):
        """Makes the mesh, if any, the ambient one."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def put(self, tree: Any, rows: bool = False) -> Any:
        """Arrays of the host on every device, or, if their first axis is that of `rows`, each with its own."""
        if self.mesh is None:
            return put(tree, None)
        return put(tree, batch_sharding(self.mesh) if rows else NamedSharding(self.mesh, PartitionSpec()))

    def room(self, new_tokens: int) -> int:
        """Cache slots for `new_tokens` chosen ones and all memories that may come between."""
        return new_tokens + (self.vlm.speech.room if self.vlm.speech else 0)

    def start(self, samples: Sequence[Sample], new_tokens: int, rows: int | None = None, copies: int = 1) -> "Session":
        """Reads the prompts; room is made for `new_tokens` more. `rows`: size of the batch, default one a prompt.

        Each prompt is read once and goes on as `copies` rows, which stand one after the other.
        """
        shards = batch_shards(self.mesh) if self.mesh else 1
        rows = -(-(rows or len(samples)) // shards) * shards
        batch = pad_prompts(samples, rows, self.tile)
        longest = max(len(sample.tokens_T) for sample in samples)
        capacity = max(bucket(longest + self.room(new_tokens), 64), batch.text.tokens_BT.shape[1])
        with self.context():
            logits_BV, state = self._read(batch, capacity, copies)
        return Session(self, state, logits_BV, len(samples) * copies, longest, capacity)

    def recall(self, sample: Sample, visual: VisualTokens, new_tokens: int, spare: int = 0) -> "Session":
        """As `start`, of one prompt without tiles, whose visual tokens were made before; rows of `visual` are alike.

        Prompts that are to have one shape, though not one length, are padded by `spare` tokens more.
        """
        rows, longest = visual.tokens_BMD.shape[0], len(sample.tokens_T)
        batch = pad_prompts([sample], rows, self.tile, spare=spare)
        T = batch.text.tokens_BT.shape[1]
        capacity = max(bucket(longest + spare + self.room(new_tokens), 64), T)
        with self.context():
            logits_BV, state = self._read(batch, capacity, 1, visual)
        return Session(self, state, logits_BV, 1, longest, capacity)

    def _read(
        self, batch: Batch, capacity: int, copies: int, visual: VisualTokens | None = None
    ) -> tuple[jax.Array, DecodeState]:
        """Scores after the prompts of a batch on the host, and the state; long prompts are read in chunks.

        `visual`: what they show, if it was seen before.
        """
        T = batch.text.tokens_BT.shape[1]
        if visual is None and (T <= PREFILL_CHUNK or self.vlm.speech):  # a memory that speaks observes prompts whole
            return self.programs.prefill(self.params, self.put(batch, rows=True), capacity, copies)
        chunks = [
            self.put(jax.tree.map(lambda x, at=at: x[:, at : at + PREFILL_CHUNK], batch.text), rows=True)
            for at in range(0, T, PREFILL_CHUNK)
        ]
        views, lengths_B = self.put((batch.views, (batch.text.segments_BT > 0).sum(-1, dtype=np.int32)), rows=True)
        visual = self.programs.see(self.params, views) if visual is None else visual
        logits_BV, state = self.programs.first(self.params, chunks[0], visual, lengths_B, capacity)
        for n, text in enumerate(chunks[1:], 2):
            last = copies if n == len(chunks) else 1
            logits_BV, state = self.programs.chunk(self.params, state, logits_BV, text, visual, last)
        return logits_BV, state

    def generate(
        self,
        samples: Sequence[Sample],
        sampling: SamplingConfig = SamplingConfig(),
        batch_size: int = 16,
        invocation: InvocationConfig = InvocationConfig(),
    ) -> list[list[int]]:
        """The answer's ids for each prompt, stop id left out. Prompts of like size share batches of `batch_size`."""
        answers: list[list[int]] = [[] for _ in samples]
        for chosen in like_sized(samples, batch_size):
            session = self.start([samples[n] for n in chosen], sampling.max_new_tokens, min(batch_size, len(samples)))
            for tokens_B in session.stream(sampling, invocation):
                for n, token in zip(chosen, tokens_B, strict=True):
                    if token != FINISHED:
                        answers[n].append(int(token))
        return answers


class Session:
    """Rows being decoded: their caches, and the scores of each row's next token."""

    def __init__(self, generator: Generator, state, logits_BV: jax.Array, prompts: int, read: int, capacity: int):
        self.generator = generator
        self.state = state
        self.logits_BV = logits_BV
        self.prompts = prompts
        """Rows that are not padding."""
        self.read = read
        """Tokens of the longest prompt, by whose length its rotary frequencies were chosen."""
        self._capacity = capacity
        rows = logits_BV.shape[0]
        self._taken_B = np.zeros(rows, int)
        self._observed_B = np.zeros(rows, int)
        self.invocations: list[list[Invocation]] = [[] for _ in range(rows)]
        """The memories in each row's answer, in order, if `draw` is to record them."""

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return self.read + int(self._taken_B.max())

    @property
    def free(self) -> int:
        """Tokens that every row can still take."""
        return self._capacity - self.length

    def stream(
        self, sampling: SamplingConfig, invocation: InvocationConfig = InvocationConfig()
    ) -> Iterator[np.ndarray]:
        """Tokens [prompts] as they come, FINISHED for rows that have none; ends when all have stopped.

        Raises ValueError if max_new_tokens are more than there is room for.
        """
        for tokens_B, _ in self.draw(sampling, invocation=invocation):
            tokens_B = np.where(np.isin(tokens_B, self.generator.stop_ids), FINISHED, tokens_B)
            if (tokens_B != FINISHED).any():
                yield tokens_B

    def draw(
        self,
        sampling: SamplingConfig,
        keys_B: jax.Array | None = None,
        invocation: InvocationConfig = InvocationConfig(),
        forced: Sequence[Sequence[int]] = (),
        record: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Tokens [prompts], the stop id of a row with them, and their log-probabilities (see `sampling.choose`).

        FINISHED for rows that had stopped before or have no token this time. `keys_B`: a random key for each row of the
        batch, in place of those of the seed. Ends and raises as `stream`.

        Where a memory speaks: the first tokens of row i are `forced[i]`, -1 leaving one to the model. A memory's latent
        tokens stand before the token that ends it and are not among the tokens. What was forced, called for by chance,
        or ends a memory was not drawn: its log-probability is NaN. `record`: keep `invocations`.
        """
        generator, speech = self.generator, self.generator.vlm.speech
        (rows, vocab), room = self.logits_BV.shape, sampling.max_new_tokens
        calls = rule = answer = delimiter_V = None
        banned_ids = generator.banned_ids
        if speech:
            banned_ids += invocation.banned_ids(speech)
            budget = invocation.budget(speech)
            room += budget * (speech.latents + 1)
            calls = generator.put(Calls.none(rows, budget), rows=True)
            rule = generator.put(Rule.make(invocation, speech, sampling.max_new_tokens, forced, rows), rows=True)
            delimiter_V = generator.put(is_delimiter(generator.delimiter_ids, vocab))
            answer = _Answer(self, invocation, budget, record)
        elif forced:
            raise ValueError("tokens can be forced where a memory speaks, but this model has none")
        if room > self.free:
            raise ValueError(
                f"the cache has room for {self.free} more tokens, got max_new_tokens {sampling.max_new_tokens}"
                + (f" and {room - sampling.max_new_tokens} for memories" if speech else "")
                + "; give start() more new_tokens"
            )
        key_B2 = None if keys_B is None else np.asarray(jax.random.key_data(keys_B))
        choice = Choice.make(sampling, rows, vocab, banned_ids, generator.stop_ids, key_B2)
        choice, needed = generator.put(choice, rows=True), generator.put(np.int32(need(sampling)))
        finished_B = generator.put(np.arange(rows) >= self.prompts, rows=True)
        late = None
        # waiting takes steps, too: how many it will be is not known where a memory speaks
        for _ in itertools.count() if speech else range(sampling.max_new_tokens):
            with generator.context():
                self.state, self.logits_BV, finished_B, tokens_B, logp_B, calls = generator.programs.step(
                    generator.params,
                    self.state,
                    self.logits_BV,
                    finished_B,
                    choice,
                    needed,
                    calls,
                    rule,
                    delimiter_V,
                )
            if late is not None:
                tokens, logp = self._read(late)
                if answer:
                    answer.hear(tokens)
                if (tokens >= 0).any():
                    yield np.where(tokens >= 0, tokens, FINISHED), logp
                if np.isin(tokens, (FINISHED, *generator.stop_ids)).all():
                    break
                if answer and (kinds_B := answer.called(tokens)) is not None:
                    calls = answer.speak(calls, kinds_B)
                    yield answer.ends(kinds_B)
            late = tokens_B, logp_B
        else:
            yield self._read(late)
        if answer:
            answer.keep()

    def _read(self, arrays: tuple[jax.Array, jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities on the host, without those of padding rows."""
        tokens_B, logp_B = (x[: self.prompts] for x in jax.device_get(arrays))
        taken_B = (tokens_B >= 0) & ~np.isin(tokens_B, self.generator.stop_ids)
        self._taken_B[: self.prompts] += taken_B
        self._observed_B[: self.prompts] += taken_B
        return tokens_B, logp_B

    def append(self, sample: Sample) -> None:
        """Adds the same tokens, and what they show, to every row; positions count from 0.

        Raises ValueError if there is no room for them, or the memory cannot see what comes after text.
        """
        count, generator = len(sample.tokens_T), self.generator
        if count > self.free:
            raise ValueError(f"the cache has room for {self.free} more tokens, got {count}")
        shows = len(sample.pixels_ISSc) > 0
        if shows and not generator.vlm.late_views:
            raise ValueError("images must come before the first token is read, since all tokens read this memory")
        batch = pad_prompts([sample] * len(self._taken_B), len(self._taken_B), generator.tile, EXTENSION_BUCKET)
        text = batch.text if shows else Text(batch.text.tokens_BT, batch.text.segments_BT)
        with generator.context():
            more = generator.put((text, batch.views) if shows else (text,), rows=True)
            self.logits_BV, self.state = generator.programs.extend(generator.params, self.state, *more)
        self._taken_B += count
        self._observed_B[:] = 0


class _Answer:
    """Answers the calls of rows with memories."""

    def __init__(self, session: Session, config: InvocationConfig, budget: int, record: bool):
        self.session = session
        self.speech: Speech = session.generator.vlm.speech
        self.heeded = config.heeded(self.speech)
        self.reversed = config.reverse_types
        self.record = record
        rows = session.logits_BV.shape[0]
        self._left_B = np.full(rows, budget)
        self._given_B = np.zeros(rows, int)
        self._latents_BND: jax.Array | None = None
        self._formed: list[tuple[np.ndarray, np.ndarray, np.ndarray, FormationInputs]] = []
        self._form, self._insert = compiled_speech(session.generator.vlm, session.generator.mesh)

    def hear(self, tokens_B: np.ndarray) -> None:
        """Counts the tokens of each row's answer, of which these are the newest."""
        self._given_B[: len(tokens_B)] += tokens_B >= 0

    def called(self, tokens_B: np.ndarray) -> np.ndarray | None:
        """The kind of memory that each row of the batch gets, -1 for none; None if no row gets any."""
        kinds_B = np.full(len(self._left_B), -1, np.int32)
        for kind, token in enumerate(self.speech.invoke_ids):
            if self.heeded[kind]:
                kinds_B[: len(tokens_B)][tokens_B == token] = (kind + self.reversed) % len(self.heeded)
        kinds_B[self._left_B == 0] = -1
        return kinds_B if (kinds_B >= 0).any() else None

    def speak(self, calls: Calls, kinds_B: np.ndarray) -> Calls:
        """Forms the memories and puts them behind their rows."""
        self.keep()
        session, generator = self.session, self.session.generator
        waiting, rows = np.flatnonzero(kinds_B >= 0), len(kinds_B)
        group = min(FORMED_ROWS, rows)
        size = bucket(min(int(session._observed_B[waiting].max()) + 1, self.speech.max_states), TEXT_BUCKET)
        with generator.context():
            if self._latents_BND is None:
                shape = rows, self.speech.latents, generator.vlm.config.decoder.width
                self._latents_BND = generator.put(np.zeros(shape, generator.vlm.dtype))
            for first in range(0, len(waiting), group):
                chosen = waiting[first : first + group]
                rows_R = np.full(group, rows, np.int32)
                rows_R[: len(chosen)] = chosen
                kinds_R = np.full(group, -1, np.int32)
                kinds_R[: len(chosen)] = kinds_B[chosen]
                self._latents_BND, inputs = self._form(
                    generator.params, session.state, self._latents_BND, rows_R, kinds_R, size
                )
                if self.record:
                    self._formed.append((chosen, kinds_B[chosen], self._given_B[chosen], inputs))
            session.state, session.logits_BV, calls = self._insert(
                generator.params, session.state, session.logits_BV, calls, self._latents_BND, kinds_B
            )
        self._left_B[waiting] -= 1
        self._given_B[waiting] += 1
        session._taken_B[waiting] += np.array(self.speech.lengths)[kinds_B[waiting]] + 1
        session._observed_B[waiting] = 0
        return calls

    def keep(self) -> None:
        """Takes what memories were formed from off the devices, if it is to be recorded."""
        for rows, kinds, places, inputs in self._formed:
            states_BJLD, lengths_BJ = jax.device_get((inputs.states_BJLD, inputs.lengths_BJ))
            for n, (row, kind, place) in enumerate(zip(rows, kinds.tolist(), places.tolist(), strict=True)):
                states_LD = states_BJLD[n, 0, : lengths_BJ[n, 0]]
                one = Invocation(kind, place, self.speech.lengths[kind], states_LD)
                self.session.invocations[row].append(one)
        self._formed.clear()

    def ends(self, kinds_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that end the memories; nobody drew them."""
        tokens_B = np.where(kinds_B >= 0, np.array(self.speech.end_ids)[np.maximum(kinds_B, 0)], FINISHED)
        return tokens_B[: self.session.prompts], np.full(self.session.prompts, np.nan, np.float32)
