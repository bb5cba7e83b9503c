"""The generation loop: prefill once, then one compiled, donated step a token. The host reads tokens one step late."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmem_jax.generate.prompts import bucket, pad_prompts
from vlmem_jax.generate.sampling import Choice, SamplingConfig, choose
from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import Params
from vlmem_jax.sharding import batch_sharding, batch_shards
from vlmem_jax.types import Sample

FINISHED = -1
"""Stands for the token of a row that has stopped."""

EXTENSION_BUCKET = 16
"""Smallest number of tokens appended to a conversation at once."""


@functools.lru_cache(maxsize=8)
def compiled(vlm: VLM):
    """prefill, extend and step of one model, each compiled at its first call."""

    def step(params, state, logits_BV, finished_B, choice, greedy):
        tokens_B = choose(logits_BV, choice, state.length_B, greedy)
        finished_B = finished_B | choice.stop_V[tokens_B]
        logits_BV, state = vlm.extend(params, state, tokens_B[:, None], 1 - finished_B.astype(jnp.int32))
        return state, logits_BV, finished_B, jnp.where(finished_B, FINISHED, tokens_B)

    return (
        jax.jit(vlm.prefill, static_argnums=2),
        jax.jit(vlm.extend, donate_argnums=1),
        jax.jit(step, static_argnums=5, donate_argnums=(1, 2, 3)),
    )


class Generator:
    """A model with its parameters, ready to answer.

    `stop_ids` end an answer and are no part of it; `banned_ids` (control tokens that have a meaning as input only) are
    never chosen. With a `mesh`, parameters must be sharded over it; rows are split over it.
    """

    def __init__(
        self,
        vlm: VLM,
        params: Params,
        *,
        stop_ids: Sequence[int],
        banned_ids: Sequence[int] = (),
        mesh: Mesh | None = None,
    ):
        self.vlm = vlm
        self.params = params
        self.stop_ids = tuple(stop_ids)
        self.banned_ids = tuple(banned_ids)
        self.mesh = mesh
        self.prefill, self.extend, self.step = compiled(vlm)

    def context(self):
        """Makes the mesh, if any, the ambient one."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def start(self, samples: Sequence[Sample], new_tokens: int, rows: int | None = None) -> "Session":
        """Reads the prompts; room is made for `new_tokens` more. `rows`: size of the batch, default one a prompt."""
        shards = batch_shards(self.mesh) if self.mesh else 1
        rows = -(-(rows or len(samples)) // shards) * shards
        batch = pad_prompts(samples, rows, self.vlm.tile)
        longest = max(len(sample.tokens_T) for sample in samples)
        capacity = max(bucket(longest + new_tokens, 64), batch.tokens_BT.shape[1])
        with self.context():
            batch = jax.device_put(batch, batch_sharding(self.mesh) if self.mesh else None)
            logits_BV, state = self.prefill(self.params, batch, capacity)
        return Session(self, state, logits_BV, len(samples), capacity - longest)

    def generate(
        self, samples: Sequence[Sample], sampling: SamplingConfig = SamplingConfig(), batch_size: int = 16
    ) -> list[list[int]]:
        """The answer's ids for each prompt, stop id left out. Prompts of like size share batches of `batch_size`."""
        order = sorted(range(len(samples)), key=lambda n: (len(samples[n].pixels_ISSc), len(samples[n].tokens_T)))
        answers: list[list[int]] = [[] for _ in samples]
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            session = self.start([samples[n] for n in chosen], sampling.max_new_tokens, min(batch_size, len(order)))
            for tokens_B in session.stream(sampling):
                for n, token in zip(chosen, tokens_B, strict=True):
                    if token != FINISHED:
                        answers[n].append(int(token))
        return answers


class Session:
    """Rows being decoded: their caches, and the scores of each row's next token."""

    def __init__(self, generator: Generator, state, logits_BV: jax.Array, prompts: int, free: int):
        self.generator = generator
        self.state = state
        self.logits_BV = logits_BV
        self.prompts = prompts
        self.free = free
        """Tokens that every row can still take."""

    def stream(self, sampling: SamplingConfig) -> Iterator[np.ndarray]:
        """Tokens [prompts] as they come, FINISHED for rows that have stopped; ends when all have.

        Raises ValueError if max_new_tokens are more than there is room for.
        """
        if sampling.max_new_tokens > self.free:
            raise ValueError(
                f"the cache has room for {self.free} more tokens, got max_new_tokens {sampling.max_new_tokens}; "
                "give start() more new_tokens"
            )
        rows, vocab = self.logits_BV.shape
        choice = Choice.make(sampling, rows, vocab, self.generator.banned_ids, self.generator.stop_ids)
        finished_B = jnp.arange(rows) >= self.prompts
        greedy = sampling.temperature == 0
        late = None
        for _ in range(sampling.max_new_tokens):
            with self.generator.context():
                self.state, self.logits_BV, finished_B, tokens_B = self.generator.step(
                    self.generator.params, self.state, self.logits_BV, finished_B, choice, greedy
                )
            self.free -= 1
            if late is not None:
                yield from self._read(late)
                if self._stopped:
                    return
            late = tokens_B
        yield from self._read(late)

    def _read(self, tokens_B: jax.Array) -> Iterator[np.ndarray]:
        """The tokens on the host, if any row still has one."""
        tokens = np.asarray(tokens_B)[: self.prompts]
        self._stopped = bool((tokens == FINISHED).all())
        if not self._stopped:
            yield tokens

    def append(self, ids: Sequence[int]) -> None:
        """Adds the same tokens to every row. Raises ValueError if there is no room for them."""
        if len(ids) > self.free:
            raise ValueError(f"the cache has room for {self.free} more tokens, got {len(ids)}")
        rows = self.logits_BV.shape[0]
        tokens_BT = np.zeros((rows, bucket(len(ids), EXTENSION_BUCKET)), np.int32)
        tokens_BT[:, : len(ids)] = ids
        with self.generator.context():
            self.logits_BV, self.state = self.generator.extend(
                self.generator.params, self.state, tokens_BT, np.full(rows, len(ids), np.int32)
            )
        self.free -= len(ids)
