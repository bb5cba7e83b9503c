"""What might be said, and how probable it is: continuations of a row that is being answered, and labels behind samples
that are read without a cache, in rollouts and in updates alike."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Float32, Int32

from vlmem_jax.data import DataConfig
from vlmem_jax.data.plan import fill_rows
from vlmem_jax.data.rows import pack_row
from vlmem_jax.generate.features import Features
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.rows import Programs, Row
from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import Params
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import PoolShape, least, powers
from vlmem_jax.runtime.sharding import batch_shards, replicate
from vlmem_jax.types import Batch, Sample, VisualTokens

CONTINUATIONS = 1, 4
"""That are scored in one call."""

OPEN_PACKS = 16
"""As `data.open_packs`."""

LABELS = 512
"""Ids that are scored in one call, at most."""

ENDS = 64
"""Samples that are scored in one row, at most."""


class LabelScores(NamedTuple):
    """How probable K labels are behind each of N samples."""

    logp_NK: Float32[np.ndarray, "N K"]
    """Of each, under the softmax of the labels alone."""
    mass_N: Float32[np.ndarray, "N"]
    """Log-probability of all of them together, under the softmax of all tokens that are not banned."""


def label_logp(
    vlm: VLM,
    params: Params,
    batch: Batch,
    labels_K: Int32[Array, "K"],
    is_label_K: Bool[Array, "K"],
    adapter_B: Int32[Array, "B"] | None = None,
    visual: VisualTokens | None = None,
) -> Float[Array, "B T K"]:
    """Log-probability of each label as the token behind each place of packed rows, under the softmax of the labels, in
    fp32. Only their columns of the head are read; `adapter_B` as in `VLM.see`; `visual`: what the rows show, where it
    was seen before."""
    if visual is None:
        visual = vlm.see(params, batch.views, adapter_B=adapter_B)
    hidden_BTD = vlm.read(params, batch.text, visual, adapter_B=adapter_B)
    kernel_DK = vlm.head_kernel(params)[:, labels_K].astype(hidden_BTD.dtype)
    logits_BTK = jnp.einsum("BTD,DK->BTK", hidden_BTD, kernel_DK, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(jnp.where(is_label_K, logits_BTK, -jnp.inf))


@functools.lru_cache(maxsize=8)
def labels_program(vlm: VLM, mesh: Mesh | None) -> Callable:
    """`labels(params, batch, visual, labels_K, is_label_K, ends_BN, banned_V)`: the `LabelScores` [B, N] of the samples
    that end at these places of packed rows; `visual` as in `label_logp`.

    Of the last token of each sample alone all scores are computed: the head is read once, and works little.
    """

    def labels(params, batch, visual, labels_K, is_label_K, ends_BN, banned_V):
        if visual is None:
            visual = vlm.see(params, batch.views)
        hidden_BTD = vlm.read(params, batch.text, visual)
        logits_BNV = vlm.score(params, jnp.take_along_axis(hidden_BTD, ends_BN[..., None], axis=1))
        logits_BNK = jnp.where(is_label_K, logits_BNV[..., labels_K], -jnp.inf)
        withheld_V = banned_V & ~jnp.zeros_like(banned_V).at[labels_K].max(is_label_K)
        total_BN = jax.nn.logsumexp(jnp.where(withheld_V, -jnp.inf, logits_BNV), axis=-1)
        mass_BN = jax.nn.logsumexp(logits_BNK, axis=-1) - total_BN
        return replicate(LabelScores(jax.nn.log_softmax(logits_BNK), mass_BN))

    return jax.jit(labels, compiler_options=options(mesh))


class Scores:
    """Both forms of scores, for an engine."""

    def __init__(self, generator: Generator, shape: PoolShape, programs: Programs, features: Features | None = None):
        self._generator, self._shape, self._programs, self._features = generator, shape, programs, features
        self.sizes = powers(16, shape.capacity)[::2]
        """Tokens of a continuation."""
        self.lanes = batch_shards(generator.mesh) if generator.mesh else 1
        """Packs that are read side by side."""
        self._banned_V = np.isin(np.arange(generator.vlm.config.decoder.vocab), generator.banned_ids)

    def continuations(self, row: Row, length: int, given: Sequence[Sequence[int]]) -> list[Float32[np.ndarray, "T"]]:
        """Scores behind a row with `length` tokens. Raises ValueError for one that is empty, or that the row has no
        room for."""
        longest, shortest = max(map(len, given)), min(map(len, given))
        room = min(self._shape.capacity - length, self.sizes[-1])
        if not 0 < shortest <= longest <= room:
            raise ValueError(
                f"a continuation must have 1 to {room} tokens, got one of {longest if shortest else 0}; give the "
                "engine more capacity"
            )
        size, found = least(self.sizes, longest), []
        for first in range(0, len(given), CONTINUATIONS[-1]):
            some = given[first : first + CONTINUATIONS[-1]]
            tokens_KT = np.full((least(CONTINUATIONS, len(some)), size), -1, np.int32)
            for n, ids in enumerate(some):
                tokens_KT[n, : len(ids)] = ids
            logp_KT = np.asarray(self.run(row, tokens_KT, np.int32(length)))
            found += [logp_KT[n, : len(ids)] for n, ids in enumerate(some)]
        return found

    def run(self, row: Row, tokens_KT: np.ndarray, used: np.int32) -> jax.Array:
        """The program."""
        with self._generator.context():
            return self._programs.score(self._generator.params, row, tokens_KT, used)

    def labels(self, samples: Sequence[Sample], given: Sequence[int]) -> LabelScores:
        """Scores behind each sample; packs of many are read at once. Raises ValueError for a sample that does not fit
        a row, or labels that are the memory's own tokens."""
        own = set(self._generator.vlm.special_tokens.values())
        if not 0 < len(given) <= LABELS or own & set(given):
            raise ValueError(f"labels must be 1 to {LABELS} ids, none of the memory's own, got {list(given)}")
        found = LabelScores(np.zeros((len(samples), len(given)), np.float32), np.zeros(len(samples), np.float32))
        packs = list(self._packs(samples))
        for first in range(0, len(packs), self.lanes):
            some = packs[first : first + self.lanes]
            rows = [[samples[n] for n in pack] for pack in some]
            shows = any(len(sample.pixels_ISSc) for row in rows for sample in row)
            read = jax.device_get(self.read(rows, given, self._shape.tiles if shows else 0))
            for row, pack in enumerate(some):
                found.logp_NK[pack] = read.logp_NK[row, : len(pack), : len(given)]
                found.mass_N[pack] = read.mass_N[row, : len(pack)]
        return found

    def read(self, packs: Sequence[Sequence[Sample]], given: Sequence[int], tiles: int) -> LabelScores:
        """The program, on samples in rows with so many tile slots, [lanes, ENDS]."""
        generator, capacity = self._generator, self._shape.capacity
        packs = [*packs, *[()] * (self.lanes - len(packs))]
        rows = [pack_row(pack, DataConfig(), generator.tile, capacity, tiles) for pack in packs]
        batch, visual = jax.tree.map(lambda *x: np.stack(x), *rows), None
        ends_BN = np.zeros((len(packs), ENDS), np.int32)
        for ends_N, pack in zip(ends_BN, packs, strict=True):
            ends_N[: len(pack)] = np.cumsum([len(sample.tokens_T) for sample in pack]) - 1
        if tiles and self._features:
            visual = self._features.of(batch.views)
            batch = batch.replace(pixels_BISSc=batch.views.pixels_BISSc[:, :0])
        batch, ends_BN = generator.given((batch, ends_BN), rows=len(packs))
        labels_K, is_label_K = np.resize(np.array(given, np.int32), LABELS), np.arange(LABELS) < len(given)
        with generator.context():
            program = labels_program(generator.vlm, generator.mesh)
            return program(generator.params, batch, visual, labels_K, is_label_K, ends_BN, self._banned_V)

    def _packs(self, samples: Sequence[Sample]) -> Iterator[list[int]]:
        """Which samples share a row."""
        capacity, most = self._shape.capacity, self._shape.tiles
        sized = [(n, len(sample.tokens_T), len(sample.pixels_ISSc)) for n, sample in enumerate(samples)]
        for n, tokens, tiles in sized:
            if tokens > capacity or tiles > most:
                raise ValueError(
                    f"sample {samples[n].name} has {tokens} tokens and {tiles} tiles, but a row of the engine has room "
                    f"for {capacity} and {most}"
                )
        for pack in fill_rows(sized, capacity, max(most, 1), OPEN_PACKS):
            yield from (pack[first : first + ENDS] for first in range(0, len(pack), ENDS))
