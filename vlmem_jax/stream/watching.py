"""What is kept of streams that are looked at: one compiled, donated step a frame, and snapshots for questions."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int32, UInt8

from vlmem_jax.generate import LoadedModel
from vlmem_jax.models import VLM
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.sharding import batch_shards, even_spec, lay_out, replicate
from vlmem_jax.trees import State, axes, from_host, map_axes, to_host
from vlmem_jax.types import Batch, Geometry, VisualTokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched(State):
    """What is carried from frame to frame."""

    memory: State
    newest_BD: Float[Array, "B D"] = axes("batch", None)
    """Mean of the tokens that the newest frame became, fp32; zeros before the first."""


class Look(NamedTuple):
    """What became of a frame of each stream."""

    taken_B: Bool[Array, "B"]
    similarity_B: Float[Array, "B"]
    """Cosine of the means of the tokens of this frame and of the newest one before it; 0 for the first."""
    kept_BL: Int32[Array, "B L"]
    """As `VLM.kept`."""


class Snapshot(NamedTuple):
    """What was kept of one stream at some moment; looking goes on without it."""

    visual: VisualTokens
    """Of one row."""
    times: tuple[float, ...]
    """When each frame in it was seen, seconds."""
    frames: int
    """Frames that had been taken."""


class Programs(NamedTuple):
    """The programs of one model on one mesh, each compiled at its first call."""

    begin: Callable
    """`begin(params, rows)`: of which nothing was seen yet."""
    look: Callable
    """`look(params, watched, views, fresh_B)`: one frame of each stream; `watched` is donated."""
    recollect: Callable
    """`recollect(params, watched, row)`: the visual tokens of what is kept of one stream."""


@functools.lru_cache(maxsize=8)
def compiled(vlm: VLM, mesh: Mesh | None) -> Programs:
    """The programs of a model on a mesh."""

    def begin(params, rows):
        newest_BD = jnp.zeros((rows, vlm.config.vision.width), jnp.float32)
        return lay_out(Watched(vlm.watch(params, rows), newest_BD))

    def look(params, watched, views, fresh_B):
        made_BND, taken_B, memory = vlm.take(params, watched.memory, views, fresh_B)
        mean_BD = made_BND.astype(jnp.float32).mean(1)
        before_BD = jnp.where(fresh_B[:, None], 0, watched.newest_BD)
        sizes_B = jnp.linalg.norm(mean_BD, axis=-1) * jnp.linalg.norm(before_BD, axis=-1)
        similarity_B = (mean_BD * before_BD).sum(-1) / jnp.maximum(sizes_B, 1e-12)
        newest_BD = jnp.where(taken_B[:, None], mean_BD, before_BD)
        seen = Look(taken_B, similarity_B, vlm.kept(params, memory))
        return lay_out(Watched(memory, newest_BD)), replicate(seen)

    def recollect(params, watched, row):
        def one(x, *names):
            return jax.lax.dynamic_slice_in_dim(x, row, 1, names.index("batch")) if "batch" in names else x

        return replicate(vlm.recollect(params, map_axes(one, watched.memory)))

    return Programs(
        jax.jit(begin, static_argnums=1, compiler_options=options(mesh)),
        jax.jit(look, donate_argnums=1, compiler_options=options(mesh)),
        jax.jit(recollect, compiler_options=options(mesh)),
    )


class Watcher:
    """Streams, a row each, that are looked at frame by frame. Threads may call it side by side."""

    def __init__(self, model: LoadedModel, rows: int = 1):
        """Raises ValueError for a model that keeps nothing of a stream, or nothing to answer from."""
        self.model, self.rows, self.vlm = model, rows, model.vlm
        self.generator = model.generator()
        self._programs = compiled(self.vlm, self.generator.mesh)
        self._lock = threading.Lock()
        with self.generator.context():
            self._watched = self._programs.begin(model.params, rows)
        kept = jax.eval_shape(self.vlm.kept, model.params, self._watched.memory)
        self.slots: int = kept.shape[1]
        """Frames that are kept for answers, at most."""
        if not self.slots:
            raise ValueError("the memory of this model keeps no frame to answer from; set model.memory.episodic")
        self.frames_B = np.zeros(rows, int)
        """Frames taken of each stream."""
        self._times: list[dict[int, float]] = [{} for _ in range(rows)]
        """When the frames that are kept were seen, by their numbers."""
        self._recollected: dict[int, VisualTokens] = {}

    @property
    def context(self) -> str:
        """Which visual tokens of a frame stand in the sequence."""
        return self.model.processor.image.context

    def look(
        self,
        tiles: Sequence[UInt8[np.ndarray, "S S c"] | None],
        times: Sequence[float],
        fresh: Sequence[bool] | None = None,
        geometry: Sequence[Geometry | None] | None = None,
    ) -> Look:
        """Takes the next frame of each stream; None: it has none this time. `times`, seconds, are when they were seen;
        `fresh` streams begin anew. What is given and what comes back lies on the host."""
        views = Batch.empty((self.rows,), 0, 1, self.vlm.tile).views
        for row, tile in enumerate(tiles):
            if tile is not None:
                views.pixels_BISSc[row, 0] = tile
                views.segments_BM[row] = 1
        if geometry is not None:
            views = dataclasses.replace(views, geometry=_stacked(geometry))
        fresh_B = np.zeros(self.rows, bool) if fresh is None else np.array(fresh)
        put = self._put((views, fresh_B))
        with self._lock, self.generator.context():
            self._watched, seen = self._programs.look(self.model.params, self._watched, *put)
            seen = jax.device_get(seen)
            for row, (is_fresh, taken) in enumerate(zip(fresh_B, seen.taken_B, strict=True)):
                if is_fresh:
                    self.frames_B[row], self._times[row] = 0, {}
                if taken:
                    self._times[row][int(self.frames_B[row])] = times[row]
                    self.frames_B[row] += 1
                if is_fresh or taken:
                    self._recollected.pop(row, None)
                kept = set(seen.kept_BL[row].tolist())
                self._times[row] = {n: time for n, time in self._times[row].items() if n in kept}
        return seen

    def snapshot(self, row: int = 0) -> Snapshot | None:
        """What is kept of a stream now; None of one of which no frame was taken. Where none came since the last time,
        the tokens are those made then."""
        with self._lock:
            if not self.frames_B[row]:
                return None
            if row not in self._recollected:
                self._recollected[row] = self._recollect(row)
            times = tuple(self._times[row][n] for n in sorted(self._times[row]))
            return Snapshot(self._recollected[row], times, int(self.frames_B[row]))

    def warm(self) -> VisualTokens:
        """Compiles what looking and snapshots take, so that no frame waits for it; gives tokens of the shape of a
        snapshot's. Not for frames with geometry."""
        self.look([None] * self.rows, [0.0] * self.rows)
        with self._lock:
            return self._recollect(0)

    def _recollect(self, row: int) -> VisualTokens:
        with self.generator.context():
            return self._programs.recollect(self.model.params, self._watched, self.generator.put(np.int32(row)))

    def save(self) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
        """All that is kept, on the host: arrays by their paths, and, of each stream, what JSON can hold."""
        with self._lock:
            arrays = to_host(self._watched)
            about = [
                {"frames": int(count), "times": {str(n): time for n, time in times.items()}}
                for count, times in zip(self.frames_B, self._times, strict=True)
            ]
        return arrays, about

    def restore(self, arrays: Mapping[str, np.ndarray], about: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what `save` gave, on whatever mesh. Raises ValueError where it does not fit."""
        with self._lock, self.generator.context():
            like = self._watched
            held = from_host(like, arrays)
            for name, (old, new) in enumerate(zip(jax.tree.leaves(like), jax.tree.leaves(held), strict=True)):
                if old.dtype != new.dtype:
                    raise ValueError(f"array {name} of a state must be {old.dtype}, got {new.dtype}")
            self._watched = lay_out(held, self._place)
            self.frames_B = np.array([row["frames"] for row in about], int)
            self._times = [{int(n): time for n, time in row["times"].items()} for row in about]
            self._recollected = {}

    def _put(self, tree: Any) -> Any:
        """Arrays whose first axis is that of the streams, on the devices."""
        mesh = self.generator.mesh
        return self.generator.put(tree, rows=mesh is not None and self.rows % batch_shards(mesh) == 0)

    def _place(self, x: np.ndarray, *names: str | None) -> jax.Array:
        """An array of a state on the devices, as `lay_out` lays out what is computed there."""
        mesh = self.generator.mesh
        return jax.device_put(x, None if mesh is None else NamedSharding(mesh, even_spec(x.shape, *names)))


def _stacked(geometry: Sequence[Geometry | None]) -> Geometry:
    """Geometry of a frame of each stream, [B, 1, N, ...]; zeros where there is none."""
    like = next(one for one in geometry if one is not None)
    each = [jax.tree.map(np.zeros_like, like) if one is None else one for one in geometry]
    return jax.tree.map(lambda *x: np.stack([np.asarray(one) for one in x])[:, None], *each)
