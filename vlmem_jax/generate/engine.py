"""One engine for all who ask: a pool of rows of fixed shapes, into which requests are put while others are answered.

    submit -> queue -> reading (chunk by chunk) -> a slot: decoding <-> waiting for a memory -> done: the slot is free

What a request gets depends on it alone: not on its neighbours, its slot, or when it came. Nobody has a loop of his own:
whoever waits for an answer drives the pool by `step`, and with it all others. The host reads tokens one step late; they
belong to those who had the slots then.
"""

import collections
import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np
from jaxtyping import Float32

from vlmem_jax.generate.features import Features
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import is_delimiter
from vlmem_jax.generate.reading import Reading
from vlmem_jax.generate.requests import Handle, Reason, Request
from vlmem_jax.generate.rows import BROKEN, Plan, Row, compiled, settings
from vlmem_jax.generate.sampling import need
from vlmem_jax.generate.score import LabelScores, Scores
from vlmem_jax.generate.speaking import Speaking
from vlmem_jax.generate.transcript import Transcript
from vlmem_jax.generate.warming import programs
from vlmem_jax.processing import Tokenizer
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.runtime.sharding import batch_shards
from vlmem_jax.trees import from_host, to_host
from vlmem_jax.types import Sample, Views

READS = 8
"""Chunks of prompts that are read between two steps, at most: so long those wait who are being answered."""


class Engine:
    """A model that answers whoever asks. Threads may call it side by side."""

    def __init__(self, generator: Generator, shape: PoolShape, tokenizer: Tokenizer | None = None):
        """`tokenizer`: for texts that end answers."""
        vlm = generator.vlm
        if vlm.speech:  # such a memory observes prompts whole
            shape = shape._replace(chunk=shape.capacity)
        self.generator, self.shape, self.vlm = generator, shape, vlm
        self._tokenizer, self._lock, self._broken = tokenizer, threading.RLock(), ""
        self._programs = compiled(vlm, generator.mesh, shape, generator.tile)
        self.lanes = batch_shards(generator.mesh) if generator.mesh else 1
        """Prompts that are read side by side."""
        self._queue: collections.deque[Reading] = collections.deque()
        self._owners: list[Handle | None] = [None] * shape.slots
        self._free = list(range(shape.slots))
        self._late: collections.deque[tuple[list[Handle | None], Any]] = collections.deque()
        with generator.context():
            self._rows: Row = self._programs.empty()
        self._delimiter_V = generator.put(is_delimiter(generator.delimiter_ids, vlm.config.decoder.vocab))
        self.features = Features(generator, shape) if shape.features else None
        """What was seen, for those who show it again."""
        self._score = Scores(generator, shape, self._programs, self.features)
        self._speaking = Speaking(generator, shape, self._programs) if vlm.speech else None

    def programs(self) -> list[str]:
        """The programs that it can need, whatever is asked of it."""
        return sorted(programs(self))

    def warm_up(self) -> None:
        """Compiles them all, before the first request: nothing compiles after that."""
        with self._lock, self._failing():
            for run in 2 * list(programs(self).values()):  # what one has given may lie elsewhere than what was empty
                jax.block_until_ready(run())

    # --- what is asked ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Raises ValueError for what the pool has no room for, or the model cannot do, with the knob."""
        return self.fork([request])[0]

    def fork(self, requests: Sequence[Request]) -> list[Handle]:
        """Several answers to one prompt, that of the first request, which is read once. Raises as `submit`."""
        for request in requests:
            self._check(request)
        with self._lock:
            if self._broken:
                raise RuntimeError(self._broken)
            handles = [self._handle(request) for request in requests]
            self._queue.append(Reading.of(handles, self.shape, self.generator.tile))
        return handles

    def cancel(self, handle: Handle) -> None:
        """See `Handle.cancel`."""
        with self._lock:
            if not handle.reason:
                self._end(handle, "cancelled")

    def _handle(self, request: Request) -> Handle:
        handle, speech = Handle(self, request), self.vlm.speech
        handle.calls_left = request.invocation.budget(speech) if speech else 0
        if request.until:
            handle.transcript = Transcript(self._tokenizer, speech, until=request.until)
        return handle

    def _check(self, request: Request) -> None:
        speech, sample, after = self.vlm.speech, request.sample, request.after
        if request.until and self._tokenizer is None:
            raise ValueError("texts can end an answer where the engine has a tokenizer; give it one")
        if after is not None and after.row is None:
            raise ValueError("a request can come after an answer that is done and kept, once; submit it with keep")
        if after is not None and len(sample.pixels_ISSc) and not self.vlm.late_views:
            raise ValueError("images must come before the first token is read, since all tokens read this memory")
        tokens, tiles, _ = wanted(self.generator, request)
        if tiles > self.shape.tiles:
            raise ValueError(f"prompt {sample.name} shows {tiles} tiles, but a row has room for {self.shape.tiles}")
        if tokens > self.shape.capacity:
            begun, new = (after.length if after else 0) + len(sample.tokens_T), request.sampling.max_new_tokens
            raise ValueError(
                f"a row has room for {self.shape.capacity} tokens, got {begun} of the prompt {sample.name}, "
                f"max_new_tokens {new}" + (f" and {tokens - begun - new} for memories" if speech else "")
            )
        settings(self.vlm, self.shape, *self._settings(request))

    def _settings(self, request: Request) -> tuple:
        speech, generator = self.vlm.speech, self.generator
        banned_ids = *generator.banned_ids, *request.banned_ids
        if speech:
            banned_ids += request.invocation.banned_ids(speech)
        stop_ids = {*generator.stop_ids, *request.stop_ids}
        return request.sampling, request.invocation, request.forced, banned_ids, stop_ids, request.key_2

    # --- what is scored -----------------------------------------------------------------------------------------------

    @overload
    def score(self, of: Handle, given: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, "T"]]: ...

    @overload
    def score(self, of: Sequence[Sample], given: Sequence[int]) -> Float32[np.ndarray, "N K"]: ...

    def score(self, of, given):
        """Log-probabilities of what might be said, which changes nothing.

        Of an answer that is being written or was kept: of each token of each continuation `given`, under the softmax of
        all tokens that are not banned, as if it had been drawn. Of N samples: of each of the K tokens `given` behind
        them, under the softmax of these alone; they are read as packed rows without a cache, and where banned ids and
        the rest cancel, both agree. Raises ValueError for what there is no room for.
        """
        if isinstance(of, Handle):
            with self._lock:
                return self._score.continuations(self._live(of), of.length, given)
        return self.labels(of, given).logp_NK

    def labels(self, samples: Sequence[Sample], given: Sequence[int]) -> LabelScores:
        """The scores of samples, and how probable it is that any of the tokens `given` follows. Raises as `score`."""
        return self._score.labels(samples, given)

    def _live(self, handle: Handle) -> Row:
        """The row of an answer, as far as its tokens have come."""
        while self._late:
            self._collect()
        if handle.row is not None:
            return handle.row
        if handle not in self._owners or handle.waits:
            raise ValueError("an answer has scores while it is written, or where it was kept")
        return self._get(self._owners.index(handle))

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Goes on with all requests by a token; whether there are any. Raises RuntimeError where the engine fails, and
        with it all of them."""
        with self._lock, self._failing():
            self._fill()
            stepped = self._dispatch()
            if len(self._late) > stepped:
                self._collect()
            if self._speaking:
                self._speak()
            return bool(self._queue or self._late or len(self._free) < self.shape.slots)

    def run(self) -> None:
        """Steps until all requests are done. Raises as `step`."""
        while self.step():
            pass

    def _fill(self) -> None:
        """Reads prompts while there are slots for them, and ahead, and puts rows that were read into free slots."""
        for _ in range(min(max(len(self._free), 1), READS)):
            if not self._queue:
                return
            reading = self._queue[0]
            reading.lanes = [[one for one in lane if not one.reason] for lane in reading.lanes]
            if reading.chunks and any(reading.lanes):
                reading = self._queue[0] = self._joined(reading)
                self._read(reading)
            if not reading.chunks:
                for number, lane in enumerate(reading.lanes):
                    while self._free and lane:
                        self._put(reading, number, lane.pop(0), self._free.pop(0))
            if not any(reading.lanes):
                self._queue.popleft()
            elif not reading.chunks:
                return

    def _joined(self, reading: Reading) -> Reading:
        """The reading with those that wait and can be read beside it, each on devices of its own."""
        if not reading.joins or len(reading.lanes) == self.lanes:
            return reading
        others = (one for one in list(self._queue)[1:] if one.joins and one.is_like(reading))
        alike = list(itertools.islice(others, self.lanes - 1))
        for one in alike:
            self._queue.remove(one)
        return reading.beside(alike, self.lanes)

    def _dispatch(self) -> bool:
        """A token for each row, if there is any."""
        running = [handle for handle in self._owners if handle and not handle.waits]
        if not running:
            return False
        needed = max(need(handle.request.sampling) for handle in running)
        with self.generator.context():
            self._rows, *tokens = self._programs.step(
                self.generator.params, self._rows, self._delimiter_V, Plan(np.int32(needed), self._used())
            )
        for x_B in tokens:
            x_B.copy_to_host_async()  # to be there when they are read, a step later
        self._late.append(([handle if handle and not handle.waits else None for handle in self._owners], tokens))
        for handle in running:
            handle.ahead += 1
            if handle.is_last and not handle.request.keep:
                self._release(handle)
        return True

    def _release(self, handle: Handle) -> None:
        """Frees the slot; what the row still does there is nobody's."""
        slot = self._owners.index(handle)
        self._owners[slot] = None
        self._free.append(slot)

    def _used(self, more: int = 2) -> np.int32:
        """Slots of the cache that the longest row fills, with a token that is not heard of yet, and the next one."""
        longest = max((handle.length for handle in self._owners if handle), default=0)
        return np.int32(min(longest + more, self.shape.capacity))

    def _collect(self) -> None:
        """The tokens of the oldest step, for those who had the slots then."""
        owners, arrays = self._late.popleft()
        tokens_B, logp_B = map(np.asarray, arrays)
        for handle, token, logp in zip(owners, tokens_B.tolist(), logp_B.tolist(), strict=True):
            if handle is None or handle.reason:
                continue
            handle.ahead -= 1
            if token == BROKEN:
                self._fail(handle, f"the scores of {handle.request.sample.name or 'a request'} are not finite")
            elif token >= 0:
                self._take(handle, token, logp)

    def _take(self, handle: Handle, token: int, logp: float) -> None:
        """A token that was chosen or forced."""
        handle.chosen += 1
        stops = token in self.generator.stop_ids or token in handle.request.stop_ids
        if not stops:
            handle.length += 1
            handle.observed += 1
            if self._speaking:
                self._speaking.hear(handle, token)
                if handle.waits:
                    self._expect_nothing(handle)
        self._say(handle, token, logp, "stop" if stops else None)

    def _expect_nothing(self, handle: Handle) -> None:
        """The row waits on the device since it called, so steps that are on their way have no token for it, even if its
        memory is there before they come."""
        handle.ahead = 0
        for owners, _ in self._late:
            owners[:] = [None if owner is handle else owner for owner in owners]

    def _say(self, handle: Handle, token: int, logp: float, reason: Reason | None = None) -> None:
        """A token that follows, and, by what is there now, whether it is the last one."""
        handle.tokens.append(token)
        handle.logp.append(logp)
        if reason is None and handle.request.on_token:
            try:
                handle.request.on_token(token)
            except Exception as error:
                self._fail(handle, f"on_token failed: {error!r}")
        if handle.transcript and reason is None:
            handle.transcript.push(token)
            reason = "text" if handle.transcript.ended else None
        if reason is None and handle.chosen >= handle.request.sampling.max_new_tokens and not handle.waits:
            reason = "length"
        if reason and not handle.reason:
            self._end(handle, reason)

    def _speak(self) -> None:
        """Forms memories that were called for, and puts them behind their rows."""
        alone = all(handle is None or handle.waits for handle in self._owners) and not self._late
        group = self._speaking.group(self._owners, alone)
        if group:
            self._rows, said = self._speaking.speak(self._rows, group, self._owners, self._used)
            for handle, token in said:
                self._say(handle, token, float("nan"))

    def _end(self, handle: Handle, reason: Reason) -> None:
        """Frees the slot at once, if it has one."""
        if handle.transcript:
            handle.transcript.flush()
        if handle in self._owners:
            if handle.request.keep and reason in ("stop", "length"):
                handle.row = self._get(self._owners.index(handle))
            self._release(handle)
        if self._speaking:
            self._speaking.keep()
        handle.reason = reason

    def _fail(self, handle: Handle, error: str) -> None:
        handle.error = error
        self._end(handle, "failed")

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails here fails all requests, with its words; arrays that were given away are lost."""
        if self._broken:
            raise RuntimeError(self._broken)
        try:
            yield
        except Exception as error:
            self._broken = f"the engine failed: {error}"
            waiting = [handle for reading in self._queue for lane in reading.lanes for handle in lane]
            for handle in (*filter(None, self._owners), *waiting):
                handle.error, handle.reason = self._broken, "failed"
            raise RuntimeError(self._broken) from error

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self, reading: Reading) -> None:
        """The next chunk of prompts."""
        generator, programs, params = self.generator, self._programs, self.generator.params
        text = reading.chunks.pop(0)
        reading.length += int((text.segments_BT > 0).sum(-1).max())
        place = functools.partial(generator.given, rows=len(text.tokens_BT))
        with generator.context():
            if isinstance(reading.visual, Views) and self.features:
                reading.visual = self.features.of(reading.visual)
            elif isinstance(reading.visual, Views):
                reading.visual = programs.see(params, place(reading.visual))
            if reading.decode is None:
                read = programs.first(params, place(text), reading.visual, place(reading.length_B))
            else:
                used = np.int32(min(reading.length, self.shape.capacity))
                read = programs.more(params, reading.decode, reading.logits_BV, place(text), reading.visual, used)
            reading.logits_BV, reading.decode = read

    def _put(self, reading: Reading, lane: int, handle: Handle, slot: int) -> None:
        """A row that was read into a slot."""
        with self.generator.context():
            if reading.row is not None:
                self._rows = self._programs.back(self._rows, reading.row, np.int32(slot))
            else:
                own = settings(self.vlm, self.shape, *self._settings(handle.request))
                read = reading.decode, reading.logits_BV, own
                self._rows = self._programs.put(self._rows, *read, np.int32(lane), np.int32(slot))
        self._owners[slot] = handle

    def _get(self, slot: int) -> Row:
        with self.generator.context():
            return self._programs.get(self._rows, np.int32(slot))

    # --- moving -------------------------------------------------------------------------------------------------------

    def take_out(self, handle: Handle) -> dict[str, np.ndarray]:
        """The row of a request that is being answered, on the host; its slot is free. Raises ValueError for another."""
        with self._lock:
            while self._late:
                self._collect()
            if handle not in self._owners:
                raise ValueError("only a request that is being answered can be taken out")
            arrays = to_host(self._get(self._owners.index(handle)))
            self._release(handle)
            return arrays

    def put_back(self, handle: Handle, arrays: dict[str, np.ndarray]) -> None:
        """Goes on with a request that was taken out, bit by bit as it was, as soon as a slot is free."""
        with self._lock, self.generator.context():
            like = jax.eval_shape(self._programs.get, self._rows, np.int32(0))
            row = self.generator.put(from_host(like, arrays))
            self._queue.append(Reading([[handle]], [], row=row))


def wanted(generator: Generator, request: Request) -> tuple[int, int, int]:
    """Tokens, tiles and forced tokens that a row must have room for."""
    speech, sample, after = generator.vlm.speech, request.sample, request.after
    tokens = (after.length if after else 0) + len(sample.tokens_T) + request.sampling.max_new_tokens
    if speech:
        tokens += request.invocation.budget(speech) * (speech.latents + 1)
    tiles = len(sample.pixels_ISSc)
    if request.visual is not None:
        tiles = request.visual.tokens_BMD.shape[1] // generator.tile.tokens
    return tokens, tiles, len(request.forced)
