"""What was seen once is not seen again: visual tokens of tiles and frames, kept on the devices by their content.

A vision tower sees each tile by itself, or, where images have their own size, each frame. So what it makes of one
serves every prompt that shows it again: captions, decisions and answers about one video.
"""

import collections
import dataclasses
import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32

from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.prompts import filled
from vlmem_jax.generate.rows import compiled
from vlmem_jax.memory import See, memory_of
from vlmem_jax.models import VLM
from vlmem_jax.models.visual import visual_tokens
from vlmem_jax.runtime.compiler import options
from vlmem_jax.runtime.shapes import PoolShape, least
from vlmem_jax.runtime.sharding import batch_shards
from vlmem_jax.trees import fitted
from vlmem_jax.types import TileShape, Views, VisualTokens


def unkept(vlm: VLM, mesh: Mesh | None, like: VisualTokens) -> str:
    """Why nothing can be kept of what such a row sees; empty if it can."""
    if mesh and batch_shards(mesh) > 1:
        return "features are kept where rows are not split; set features=0, or mesh.data=mesh.fsdp=1"
    if like.kept is not None or issubclass(memory_of(vlm.config.memory), See):
        return "features are visual tokens, but the memory reads the vision tower itself; set features=0"
    return ""


class _Kept(NamedTuple):
    """Visual tokens of S tiles, P a tile."""

    tokens_SPD: Float[jax.Array, "S P D"]
    deep_NSPD: Float[jax.Array, "N S P D"] | None
    """As in `VisualTokens`."""


class _Programs(NamedTuple):
    like: VisualTokens
    """The shapes of what a row sees, whatever it shows."""
    keep: Callable
    """`keep(kept, tokens_BMD, deep_NBMD, slots_I)`: the tiles of a row in their slots; `kept` is donated."""
    show: Callable
    """`show(kept, slots_I, views)`: what a row sees whose tiles are in these slots."""


class Features:
    """Visual tokens of up to `PoolShape.features` tiles; those not shown for the longest time make room."""

    def __init__(self, generator: Generator, shape: PoolShape):
        """Raises ValueError where a memory reads more of the tower than visual tokens, or rows are split."""
        vlm, tile = generator.vlm, generator.tile
        if shape.features < shape.tiles:
            raise ValueError(f"features must hold the {shape.tiles} tiles of a prompt, got {shape.features}")
        self._programs = _compiled(vlm, generator.mesh, shape, tile)
        like = self._programs.like
        if why := unkept(vlm, generator.mesh, like):
            raise ValueError(why)
        self.seen = self.found = 0
        """Tiles that the tower saw, and that were there already."""
        self._generator, self._shape, self._lock = generator, shape, threading.Lock()
        self._see = compiled(vlm, generator.mesh, shape, tile).see
        sizes, tokens, deep = (shape.features, tile.tokens), like.tokens_BMD, like.deep_NBMD
        deep_NSPD = None if deep is None else np.zeros((len(deep), *sizes, deep.shape[-1]), deep.dtype)
        self._kept: _Kept = generator.put(_Kept(np.zeros((*sizes, tokens.shape[-1]), tokens.dtype), deep_NSPD))
        self._places: collections.OrderedDict[bytes, np.ndarray] = collections.OrderedDict()
        """The slots of what was seen, from what was shown last the longest time ago."""
        self._free = list(range(shape.features))

    def of(self, views: Views) -> VisualTokens:
        """As `VLM.see`, of one row on the host: the tower sees what is not here."""
        slots_I = np.full(views.pixels_BISSc.shape[1], self._shape.features, np.int32)
        parts = list(_parts(views))
        with self._lock:
            new: dict[bytes, np.ndarray] = {}
            for key, tiles in parts:
                if key in self._places:
                    self._places.move_to_end(key)
                    self.found += len(tiles)
                elif key not in new:
                    new[key] = tiles
            if new:
                self._look(views, new, {key for key, _ in parts})
            for key, tiles in parts:
                slots_I[tiles] = self._places[key]
            rest = dataclasses.replace(views, pixels_BISSc=views.pixels_BISSc[:, :, :0])  # is not sent again
            return self.show(rest, slots_I)

    def _look(self, views: Views, new: dict[bytes, np.ndarray], needed: set[bytes]) -> None:
        """Sees the tiles of new parts, in a row of their own."""
        generator, chosen = self._generator, np.concatenate(list(new.values()))
        while len(self._free) < len(chosen):
            oldest = next(key for key in self._places if key not in needed)
            self._free += self._places.pop(oldest).tolist()
        count, slots_I = len(chosen), np.full(self._shape.tiles, self._shape.features, np.int32)
        slots_I[:count] = self._free[:count]
        own = filled([], 1, generator.tile, 1, least(self._shape.tile_sizes(generator.tile), count)).views
        own.pixels_BISSc[0, :count] = views.pixels_BISSc[0, chosen]
        places, place = {}, 0
        for key, tiles in new.items():
            here = slice(place, place + len(tiles))
            places[key] = slots_I[here].copy()
            if own.layout_BI4 is not None:
                own.layout_BI4[0, here] = _relative(views.layout_BI4[0, tiles]) + [place, place, 0, 0]
            place += len(tiles)
        with generator.context():
            self.keep(self._see(generator.params, own), slots_I)
        self._places |= places  # now that they are there: what fails to be seen is asked for again
        del self._free[:count]
        self.seen += count

    def keep(self, seen: VisualTokens, slots_I: Int32[np.ndarray, "I"]) -> None:
        """Puts the tiles of a row into slots; those beyond the last slot are left out."""
        with self._generator.context():
            self._kept = self._programs.keep(self._kept, seen.tokens_BMD, seen.deep_NBMD, slots_I)

    def show(self, views: Views, slots_I: Int32[np.ndarray, "I"]) -> VisualTokens:
        """What a row sees whose tiles are in these slots."""
        with self._generator.context():
            return self._programs.show(self._kept, slots_I, views)


def _parts(views: Views) -> Iterator[tuple[bytes, Int[np.ndarray, "n"]]]:
    """What the tower sees by itself: the key of its content, and the tiles of the row that it is."""
    pixels_ISSc, layout_BI4 = views.pixels_BISSc[0], views.layout_BI4
    tokens = views.segments_BM.shape[1] // len(pixels_ISSc)
    used = int((views.segments_BM[0, ::tokens] > 0).sum())
    firsts_I = np.arange(used) if layout_BI4 is None else layout_BI4[0, :used, 1] - 1
    for tiles in np.split(np.arange(used), np.flatnonzero(np.diff(firsts_I)) + 1) if used else ():
        content = hashlib.blake2b(pixels_ISSc[tiles].tobytes(), digest_size=16)
        if layout_BI4 is not None:
            content.update(_relative(layout_BI4[0, tiles]).tobytes())
        yield content.digest(), tiles


def _relative(layout_I4: Int32[np.ndarray, "I 4"]) -> Int32[np.ndarray, "I 4"]:
    """The layout of a frame whose first tile is the first of the row."""
    first = layout_I4[0, 1] - 1
    return layout_I4 - np.array([first, first, 0, 0], np.int32)


@functools.lru_cache(maxsize=8)
def _compiled(vlm: VLM, mesh: Mesh | None, shape: PoolShape, tile: TileShape) -> _Programs:
    views = filled([], 1, tile, 1, shape.tiles).views
    like = jax.eval_shape(compiled(vlm, mesh, shape, tile).see, vlm.abstract(), views)

    def keep(kept, tokens_BMD, deep_NBMD, slots_I):
        tokens_IPD = tokens_BMD.reshape(len(slots_I), -1, tokens_BMD.shape[-1])
        tokens_SPD, deep_NSPD = kept.tokens_SPD.at[slots_I].set(tokens_IPD, mode="drop"), None
        if deep_NBMD is not None:
            deep_NIPD = deep_NBMD.reshape(len(deep_NBMD), *tokens_IPD.shape)
            deep_NSPD = kept.deep_NSPD.at[:, slots_I].set(deep_NIPD, mode="drop")
        return _Kept(tokens_SPD, deep_NSPD)

    def show(kept, slots_I, views):
        def chosen(x: jax.Array, axis: int) -> jax.Array:
            x = jnp.take(x, slots_I, axis, mode="fill", fill_value=0)
            return x.reshape(*x.shape[:axis], 1, -1, x.shape[-1])

        deep_NBMD = None if kept.deep_NSPD is None else chosen(kept.deep_NSPD, 1)
        return fitted(visual_tokens(chosen(kept.tokens_SPD, 0), views, deep_NBMD), like)

    how = {"compiler_options": options(mesh)}
    return _Programs(like, jax.jit(keep, donate_argnums=0, **how), jax.jit(show, **how))
