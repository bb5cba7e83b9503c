"""From the pack plan to batches: rows decoded ahead by threads, batches sent to the devices ahead of their step."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vlmem_jax.data.plan import SKIP_HINT, Plan
from vlmem_jax.data.rows import blank_sample, pack_row
from vlmem_jax.data.samples import Key
from vlmem_jax.runtime.sharding import batch_sharding
from vlmem_jax.types import Batch, Sample

log = logging.getLogger(__name__)

SUBSTITUTES = 100
"""Rows that are tried in place of one with nothing readable, before data count as gone."""


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One step: this host's rows, and numbers of the whole step that every host takes from the plan."""

    step: int
    batch: Batch
    """Leading axes [accumulation, rows of this host] and numpy arrays; on devices, [accumulation, all rows]."""
    denominator: float
    """Sum of the loss weights over all hosts and accumulation steps."""
    tokens: int
    """Tokens over all hosts, padding not counted."""
    tiles: int
    """Image tiles over all hosts, padding not counted."""
    images: int
    """Images and video frames over all hosts."""
    sizes: list[tuple[int, int]]
    """Tokens and tiles of each sample over all hosts."""
    sample_ids: list[str]
    """`file:line` of this host's samples, in the order of the batch."""


def local_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of the `rows` rows of a global batch the devices of this process hold, ascending.

    Raises ValueError if the rows cannot be split evenly over the mesh.
    """
    sharding = batch_sharding(mesh)
    parts = math.prod(mesh.shape[axis] for axis in sharding.spec[0])
    if rows % parts:
        raise ValueError(
            f"mesh.data x mesh.fsdp = {parts} must divide the {rows} rows of a batch; "
            "data.rows / accumulation must be a multiple of it"
        )
    held = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in held]))


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """Global arrays of this host's [accumulation, rows, ...] arrays, rows split over the mesh. Does not wait."""
    with jax.transfer_guard_host_to_device("allow"):  # of several hosts, jax takes it for an implicit transfer
        return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=1), batch)


class PackedData:
    """Step after step of packed rows. `data[step]` depends on files, seed and step alone, so a step is all the state.

    A sample that turns out unreadable when its images are decoded follows `data.on_bad_sample`. Skipped, it keeps its
    place without targets, and the other samples of the row share its loss weight, so the denominator that all hosts
    took from the plan stays true; a row with nothing left is replaced by the nearest row before it.
    """

    def __init__(self, plan: Plan, first_row: int, steps: int, accumulation: int, mesh: Mesh | None):
        config = plan.config
        if config.rows % accumulation:
            raise ValueError(f"accumulation {accumulation} must divide data.rows {config.rows}, the rows of a step")
        self.plan, self.config, self.accumulation = plan, config, accumulation
        self.unreadable: dict[str, str] = {}
        """Samples that this host could not decode so far, and why."""
        self._first_row, self._steps = first_row, steps
        self._local_rows = self._rows_of_step(mesh)
        if jax.process_count() > 1:
            message = "hosts must see the same data files, but their pack plans differ"
            multihost_utils.assert_equal(np.uint32(plan.fingerprint(len(plan))), message)

    def __len__(self) -> int:
        """Number of steps."""
        return self._steps

    def __getitem__(self, step: int) -> HostBatch:
        """The batch of a step. Raises ValueError naming the sample if one cannot be used."""
        if not 0 <= step < len(self):
            raise IndexError(f"the data has {len(self)} steps; there is no step {step}")
        first = step * len(self._local_rows)
        return self._assemble([self._load_row(first + i) for i in range(len(self._local_rows))])

    def iterate(self, start: int = 0) -> Iterator[HostBatch]:
        """The steps from `start` on, rows decoded by `data.threads` threads, `data.prefetch` steps ahead.

        Errors come up at the step they belong to. `close()` the iterator to leave early.
        """
        return iter(self._dataset(start))

    def on_devices(self, mesh: Mesh, start: int = 0) -> Iterator[HostBatch]:
        """`iterate` with batches of global arrays, sent by a thread while the step before them computes."""
        if self._rows_of_step(mesh) != self._local_rows:
            raise ValueError("data must be made for the mesh they go to; give it when making them")

        def send(host: HostBatch) -> HostBatch:
            return dataclasses.replace(host, batch=jax.block_until_ready(to_device(host.batch, mesh)))

        return iter(ThreadPrefetchIterDataset(self._dataset(start).map(send), prefetch_buffer_size=1))

    def _rows_of_step(self, mesh: Mesh | None) -> list[int]:
        """Which rows of a step the devices of this host hold; all without a mesh."""
        micro = self.config.rows // self.accumulation
        held = np.arange(micro) if mesh is None else local_rows(mesh, micro)
        return (np.arange(self.accumulation)[:, None] * micro + held).ravel().tolist()

    def _dataset(self, start: int) -> grain.IterDataset:
        rows, threads = len(self._local_rows), self.config.thread_count
        options = grain.ReadOptions(threads, max(threads, self.config.prefetch * rows))
        return (
            grain.MapDataset.range(start * rows, len(self) * rows)
            .map(self._load_row)
            .to_iter_dataset(options)
            .batch(rows, drop_remainder=True, batch_fn=self._assemble)
        )

    def _load_row(self, index: int) -> tuple[int, Batch, list[str]]:
        """Step, row and its sample names: row number `index` of those this host decodes."""
        step, place = divmod(index, len(self._local_rows))
        row = self._first_row + step * self.config.rows + self._local_rows[place]
        if row >= len(self.plan):  # padding of the last step of one pass
            return step, self._pack([]), []
        candidates = itertools.chain(range(row, -1, -1), range(row + 1, len(self.plan)))
        for candidate in itertools.islice(candidates, 1 + SUBSTITUTES):
            keys = self.plan.row(candidate)
            samples = [self._load(key, candidate, place) for place, key in enumerate(keys)]
            kept = [key for key, sample in zip(keys, samples, strict=True) if sample is not None]
            if not kept:
                continue
            packed = self._pack([sample or self._blank(key) for key, sample in zip(keys, samples, strict=True)])
            if candidate != row or len(kept) < len(keys):
                scale = self.plan.weight(self.plan.row(row)) / self.plan.weight(kept)
                packed = packed.replace(weights_BT=packed.text.weights_BT * np.float32(scale))
            return step, packed, [self.plan.samples.name(key) for key in keys]
        raise ValueError(f"no sample can be read any more; the last that failed: {[*self.unreadable.values()][-1]}")

    def _load(self, key: Key, row: int, place: int) -> Sample | None:
        """The sample at a place of the plan, or None if it is to be skipped."""
        samples, augment = self.plan.samples, None
        if self.config.jpeg_augment and samples.seed is not None:
            augment = np.random.default_rng([samples.seed, row, place])
        try:
            return samples.load(key, augment)
        except ValueError as error:
            if self.config.on_bad_sample == "raise":
                raise ValueError(f"{error}; {SKIP_HINT}") from error
            name = samples.name(key)
            if name not in self.unreadable:
                log.warning("sample skipped: %s", error)
            self.unreadable[name] = str(error)
            return None

    def _blank(self, key: Key) -> Sample:
        samples = self.plan.samples
        return blank_sample(samples.size(key), samples.processor.tile)

    def _pack(self, samples: Sequence[Sample]) -> Batch:
        return pack_row(samples, self.config, self.plan.samples.processor.tile)

    def _assemble(self, rows: Sequence[tuple[int, Batch, list[str]]]) -> HostBatch:
        """The step of these rows."""
        step, plan = rows[0][0], self.plan
        shape = (self.accumulation, len(rows) // self.accumulation)
        batch = jax.tree.map(
            lambda *leaves: np.stack(leaves).reshape(*shape, *leaves[0].shape), *(row for _, row, _ in rows)
        )
        first = self._first_row + step * self.config.rows
        span = range(first, min(first + self.config.rows, len(plan)))
        keys = [key for row in span for key in plan.row(row)]
        sizes = [plan.samples.size(key) for key in keys]
        return HostBatch(
            step,
            batch,
            denominator=plan.weight(keys),
            tokens=sum(size.tokens for size in sizes),
            tiles=sum(size.tiles for size in sizes),
            images=sum(size.images for size in sizes),
            sizes=[(size.tokens, size.tiles) for size in sizes],
            sample_ids=[name for _, _, names in rows for name in names],
        )


class TrainData(PackedData):
    """`steps` steps of `Plan.train(...)`, which is made that long at once.

    `first_step` steps are left out, so that a stage can go on where the one before it ended. With a `mesh`, this
    process decodes the rows that its devices hold; without, all rows.
    """

    def __init__(self, plan: Plan, steps: int, *, accumulation: int = 1, mesh: Mesh | None = None, first_step: int = 0):
        plan.extend((first_step + steps) * plan.config.rows)
        super().__init__(plan, first_step * plan.config.rows, steps, accumulation, mesh)


class EvalData(PackedData):
    """All of `Plan.eval(...)`; rows of padding, of weight 0, complete the last step."""

    def __init__(self, plan: Plan, *, mesh: Mesh | None = None):
        plan.extend()
        super().__init__(plan, 0, math.ceil(len(plan) / plan.config.rows), 1, mesh)
