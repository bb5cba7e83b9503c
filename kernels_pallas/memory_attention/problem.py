"""What crosses from the API to a backend."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import rotary
from kernels_pallas.memory_attention.blocks import CORES

Positions = jax.Array | rotary.Tables | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static side of one call."""

    theta: float = 1e6
    chip: str = "v5e"
    """TPU whose block sizes to use."""
    interpret: bool = False

    @property
    def cores(self) -> int:
        """TensorCores of a chip that share a kernel's work."""
        return CORES[self.chip]


class Inputs(NamedTuple):
    """Arrays of one call. q [B, T, H, C], k, v [B, M, K, C]; segments [B, .], 0 or less attends to nothing; limit
    [B, T]: slots from there on are out of reach, as those from num_valid [B] on are. k_pos is None where k is turned
    already."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_pos: Positions = None
    k_pos: Positions = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    limit: jax.Array | None = None
    num_valid: jax.Array | None = None
    q_prefix: jax.Array | None = None
    """[B, T], with segments: the one that a query also attends to, 0 or less: none. The GPU's kernels alone have it."""

    @property
    def masked(self) -> bool:
        """Whether queries of a row reach different slots."""
        return self.k_segments is not None or self.limit is not None

    def by_query(self) -> "Inputs":
        """Inputs that say by a limit of each query what `num_valid` says."""
        if self.num_valid is None:
            return self
        valid = jnp.broadcast_to(self.num_valid[:, None], self.q.shape[:2])
        return self._replace(limit=valid if self.limit is None else jnp.minimum(self.limit, valid), num_valid=None)

    def slots(self, start: int, stop: int) -> "Inputs":
        """The part of the memory in [start, stop)."""
        if start == 0 and stop >= self.k.shape[1]:
            return self
        k, v, k_pos, k_segments = jax.tree.map(
            lambda x: x[:, start:stop], (self.k, self.v, self.k_pos, self.k_segments)
        )
        limit, num_valid = jax.tree.map(
            lambda count: jnp.clip(count - start, 0, k.shape[1]), (self.limit, self.num_valid)
        )
        return self._replace(k=k, v=v, k_pos=k_pos, k_segments=k_segments, limit=limit, num_valid=num_valid)

    def queries(self, start: int, stop: int) -> "Inputs":
        """The part of the queries in [start, stop)."""
        if start == 0 and stop >= self.q.shape[1]:
            return self
        q, q_pos, q_segments, limit = jax.tree.map(
            lambda x: x[:, start:stop], (self.q, self.q_pos, self.q_segments, self.limit)
        )
        return self._replace(q=q, q_pos=q_pos, q_segments=q_segments, limit=limit)

    def allowed(self) -> jax.Array | None:
        """bool [B, T, M], or None when each query reaches each slot. For reductions and for plain JAX."""
        if self.num_valid is not None:
            return self.by_query().allowed()
        allowed = None
        if self.k_segments is not None:
            k_segments = self.k_segments[:, None]
            allowed = (self.q_segments[:, :, None] == k_segments) & (k_segments > 0)
        if self.limit is not None:
            near = jnp.arange(self.k.shape[1]) < self.limit[:, :, None]
            allowed = near if allowed is None else allowed & near
        return allowed

    def has_memory(self) -> jax.Array | None:
        """bool [B, T]; XLA fuses the comparison into the reduction, so that no [T, M] array is stored."""
        allowed = self.allowed()
        return None if allowed is None else allowed.any(axis=-1)


def reach(
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    limit: jax.Array | None,
    num_slots: int,
    rows: int,
    width: int,
) -> jax.Array:
    """bool [B, N/rows, M/width], rounded up: blocks in which some query may attend to some slot; never wrongly False.

    q_segments, limit [B, N] of queries; k_segments [B, M]. Segments of 0 or less meet nothing.
    """

    def blocks(x, size):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)))
        return x.reshape(x.shape[0], -1, size)

    starts = jnp.arange(0, num_slots, width)
    reached = jnp.ones((1, 1, len(starts)), bool)
    if q_segments is not None:
        parts = [blocks(q_segments, rows), blocks(k_segments, width)]
        big = jnp.iinfo(parts[0].dtype).max
        low = [jnp.where(x > 0, x, big).min(axis=-1) for x in parts]
        high = [jnp.where(x > 0, x, -1).max(axis=-1) for x in parts]
        reached = (high[0][:, :, None] >= low[1][:, None]) & (low[0][:, :, None] <= high[1][:, None])
    if limit is not None:
        reached = reached & (starts < blocks(limit, rows).max(axis=-1)[:, :, None])
    return reached


def spans(reached: jax.Array) -> jax.Array:
    """int32 [.., 2]: first entry of the last axis that is True and the one after the last; zeros where none is."""
    some = reached.any(axis=-1)
    first, behind = jnp.argmax(reached, axis=-1), jnp.argmax(reached[..., ::-1], axis=-1)
    ends = jnp.stack([first, reached.shape[-1] - behind], axis=-1)
    return jnp.where(some[..., None], ends, 0).astype(jnp.int32)
