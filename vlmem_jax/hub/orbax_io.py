"""Parameters of an orbax checkpoint leaf by leaf: nothing larger than a few layers of one leaf is in memory at a time.

orbax by itself holds whole leaves, several times over. Here a leaf is a `Leaf`: orbax keeps the books, and its handler
of that type moves the data slab by slab. What is written restores like any other checkpoint.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from vlmem_jax.checkpoint.store import quieten_orbax
from vlmem_jax.hub.leaves import Leaf, NonFiniteError
from vlmem_jax.paths import AnyPath
from vlmem_jax.trees import flatten, unflatten

CHUNK_BYTES = 32 << 20
"""Of a chunk in the file, unless one row of the first axis is more: a layer of a stacked leaf is read alone."""
SLAB_BYTES = 64 << 20
"""Read or written at once."""


def write_leaves(step_folder: AnyPath, leaves: Mapping[str, Leaf], progress: Callable[[int], None]) -> None:
    """Writes the parameters of an orbax checkpoint from path -> leaf; `progress` is told the bytes done so far.

    Raises OSError if the disk does not take it.
    """
    handler = _Handler(progress)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Leaf, handler), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    quieten_orbax()
    try:
        params = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(params=params)) as checkpointer:
            checkpointer.save(step_folder, args=ocp.args.Composite(params=ocp.args.PyTreeSave(unflatten(leaves))))
    finally:
        handler.stop()


class _Handler(ocp.type_handlers.NumpyHandler):
    """Writes a leaf as if it were an array."""

    def __init__(self, progress: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._done = 0
        self._stopped = False
        self._writing = threading.Lock()

    def typestr(self) -> str:
        return "jax.Array"  # what restoring gives

    def stop(self) -> None:
        """Ends the writing, which goes on in a thread of orbax when the main thread is interrupted."""
        self._stopped = True
        with self._writing:
            pass

    async def _background_serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value], [info], [arg])

    async def _open_and_write(self, value, tspec, ts_context):
        row_bytes = max(value.nbytes // value.shape[0], 1)
        chunk = min(max(CHUNK_BYTES // row_bytes, 1), value.shape[0])
        tspec["metadata"]["chunks"] = (chunk, *value.shape[1:])
        with self._writing:
            try:
                await self._write(value, chunk * max(SLAB_BYTES // (chunk * row_bytes), 1), tspec, ts_context)
            except NonFiniteError:
                raise
            except ValueError as error:
                raise OSError(f"the checkpoint could not be written: {str(error).rsplit(': ', 1)[-1]}") from error

    async def _write(self, value, rows, tspec, ts_context):
        self._check_stopped()
        stored = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        start = 0
        for slab in value.slabs(rows):
            self._check_stopped()
            # the slab outlives the write, so that tensorstore need not copy it
            await stored[start : start + len(slab)].write(slab, can_reference_source_data_indefinitely=True)
            start += len(slab)
            self._done += slab.nbytes
            self._progress(self._done)

    def _check_stopped(self) -> None:
        if self._stopped:
            raise InterruptedError("stopped")


class Stored(Leaf):
    """A leaf of a checkpoint."""

    def __init__(self, folder: AnyPath, path: str):
        kvstore = {"driver": "ocdbt", "base": f"{folder.as_uri()}/", "path": path.replace("/", ".") + "/"}
        self._store = tensorstore.open({"driver": "auto", "kvstore": kvstore}, open=True, read=True).result()
        super().__init__(self._store.shape, self._store.dtype.numpy_dtype)

    def read(self, index):
        return self._store[self._full(index)].read().result()

    def slabs(self, rows: int = 0) -> Iterator[np.ndarray]:
        """As in Leaf; by default as many rows as are good to read at once."""
        chunk = self._store.chunk_layout.read_chunk.shape[0]
        chunk_bytes = chunk * math.prod(self.shape[1:]) * self.dtype.itemsize
        return super().slabs(rows or chunk * max(SLAB_BYTES // max(chunk_bytes, 1), 1))


def read_leaves(folder: AnyPath) -> dict[str, Leaf]:
    """Every leaf of an item of an orbax checkpoint, by path."""
    quieten_orbax()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
    return {path: Stored(folder, path) for path in flatten(tree)}
