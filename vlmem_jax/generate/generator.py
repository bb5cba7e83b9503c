"""A model with its parameters, on the devices where it answers."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmem_jax.models import VLM
from vlmem_jax.models.vlm import Params
from vlmem_jax.runtime.sharding import batch_sharding, put
from vlmem_jax.types import TileShape


class Generator:
    """A model with its parameters, ready to answer: an `Engine` draws tokens of it.

    `stop_ids` end an answer and are no part of it; `banned_ids` (control tokens that have a meaning as input only) are
    never chosen; after `delimiter_ids` chance may call for a memory, see `InvocationConfig`. `tile`: that of the
    processor of its prompts, by default the model's. With a `mesh`, parameters must be sharded over it; rows are split
    over it.
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

    def context(self):
        """Makes the mesh, if any, the ambient one."""
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def put(self, tree: Any, rows: bool = False) -> Any:
        """Arrays of the host on every device, or, if their first axis is that of `rows`, each with its own."""
        if self.mesh is None:
            return put(tree, None)
        return put(tree, batch_sharding(self.mesh) if rows else NamedSharding(self.mesh, PartitionSpec()))

    def given(self, tree: Any, rows: int = 1) -> Any:
        """What the host gives to a program. One row stays on the host: the call sends its arrays together, while `put`,
        which sends them one by one, takes longer than a call does; of several, each goes to its own devices."""
        return self.put(tree, rows=True) if rows > 1 else tree
