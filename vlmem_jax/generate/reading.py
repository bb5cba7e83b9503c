"""Prompts on their way into the rows of an engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vlmem_jax.generate.prompts import filled
from vlmem_jax.generate.requests import Handle
from vlmem_jax.generate.rows import Row, prompt_text
from vlmem_jax.runtime.shapes import PoolShape, least
from vlmem_jax.types import DecodeState, Text, TileShape, Views, VisualTokens


@dataclasses.dataclass
class Reading:
    """Prompts of one shape that are being read side by side, each in a lane, and those who will go on from them."""

    lanes: list[list[Handle]]
    chunks: list[Text]
    length: int = 0
    """Tokens of the longest that are read."""
    visual: Views | VisualTokens | None = None
    length_B: np.ndarray | None = None
    """Tokens of the whole prompts, where they are read from their beginning."""
    decode: DecodeState | None = None
    logits_BV: jax.Array | None = None
    row: Row | None = None
    """A row that was taken out, which goes on."""

    @classmethod
    def of(cls, handles: list[Handle], shape: PoolShape, tile: TileShape) -> "Reading":
        """The prompt of the first of the requests, on the host; what it shows is seen when its turn comes."""
        request = handles[0].request
        sample, after, visual = request.sample, request.after, request.visual
        count, shown = len(sample.tokens_T), len(sample.pixels_ISSc)
        sizes = shape.more_sizes if after or count > shape.chunk else shape.text_sizes
        whole, rest = divmod(count, shape.chunk)
        padded = whole * shape.chunk + (least(sizes, rest) if rest else 0)
        batch = filled([sample], 1, tile, padded, least(shape.tile_sizes(tile), shown) if shown else 0)
        text, visual = prompt_text(batch.text), batch.views if shown else visual
        if after:
            text, visual = _moved(after, text, visual)
        chunks = [
            jax.tree.map(lambda x, at=at: x[:, at : at + shape.chunk], text) for at in range(0, padded, shape.chunk)
        ]
        read, length = (after.read, after.length) if after else (count, 0)
        for handle in handles:
            handle.read, handle.length = read, length + count
        # a list of its own: those who are read leave it
        reading = cls([list(handles)], chunks, length, visual)
        if after:
            reading.decode, reading.logits_BV, after.row = after.row.decode, after.row.logits_BV, None
        else:
            reading.length_B = np.array([count], np.int32)
        return reading

    @property
    def joins(self) -> bool:
        """Whether others can be read beside it: nothing of it is on the devices yet."""
        return self.length_B is not None and self.decode is None and not isinstance(self.visual, VisualTokens)

    def is_like(self, other: "Reading") -> bool:
        """Whether both are read by the same programs."""
        return _shapes(self.chunks, self.visual) == _shapes(other.chunks, other.visual)

    def beside(self, others: Sequence["Reading"], lanes: int) -> "Reading":
        """All of them, and empty lanes up to so many."""

        def joined(*each: np.ndarray) -> np.ndarray:
            empty = np.zeros((lanes - len(each), *each[0].shape[1:]), each[0].dtype)
            return np.concatenate([*each, empty])

        each = [(one.chunks, one.visual, one.length_B) for one in (self, *others)]
        chunks, visual, length_B = jax.tree.map(joined, *each)
        handles = [one for reading in (self, *others) for one in reading.lanes]
        return Reading(handles, chunks, 0, visual, np.maximum(length_B, 1))


def _moved(after: Handle, text: Text, visual: Views | VisualTokens | None) -> tuple[Text, Any]:
    """A text, and what it shows, that go on where a row stands."""
    if visual is None:
        return Text(text.tokens_BT, text.segments_BT), None
    here_B = jax.device_get(after.row.decode.position_B)
    here = here_B.reshape(-1, *(1,) * (text.positions_BT.ndim - 1))
    return dataclasses.replace(text, positions_BT=text.positions_BT + here), visual.moved(here)


def _shapes(*trees: Any) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(trees)]
