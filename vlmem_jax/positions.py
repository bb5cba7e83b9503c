"""Where tokens stand: rotary positions of text and visual tokens, and the windows of packed patches. Pure numpy.

A tiled image is seen twice: as a thumbnail of side x side tokens and as tiles of that size. RoPE-DHR (CoMemo sec. 3.2)
gives each token of a tile the position of the thumbnail cell it lies in, so that an image of any number of tiles
spends side * side positions.

M-RoPE (Qwen2-VL, arXiv 2409.12191, sec. 2.1) gives each token three positions, time, row and column: of text all equal.
"""

import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

DHR_MAPS = ("code", "raster", "fine")
"""`code`: the map of the authors' released weights. `raster`: the geometric map of the paper's text. `fine`: the same,
beside which a memory knows the place of each token inside its cell, see `fine_places`."""
PLACES = 64
"""Of a cell in the `fine` map, far enough apart for rotary attention to tell. Those of more tokens share places."""


def tile_count(cols: int, rows: int, thumbnail: bool = True) -> int:
    """Tiles of a grid, with the thumbnail that a grid of several tiles gets."""
    return cols * rows + (thumbnail and cols * rows > 1)


def dhr_map(
    cols: int, rows: int, side: int, base: int = 0, kind: str = "code", thumbnail: bool = True
) -> Int32[np.ndarray, "N"]:
    """Positions of one image's tokens, tile after tile and then the thumbnail, all in [base, base + side**2).

    `side` is the number of tokens along a tile. Raises ValueError for an unknown `kind` or an empty grid
    (CoMemo sec. 3.2).
    """
    return _relative_map(int(cols), int(rows), int(side), kind, bool(thumbnail)) + np.int32(base)


def fine_places(cols: int, rows: int, side: int, thumbnail: bool = True) -> Int32[np.ndarray, "N"]:
    """Where each of one image's tokens lies inside its cell of the thumbnail, below PLACES, in the order of `dhr_map`.

    The cols * rows tokens of a cell are spread over its places, row after row; the thumbnail's own is at place 0.
    """
    x, y = np.arange(cols * side) % cols, np.arange(rows * side) % rows
    index = (y[:, None] * cols + x).reshape(rows, side, cols, side).swapaxes(1, 2)
    places = spread_places(index.reshape(-1), cols * rows)
    alone = np.zeros(side * side * (tile_count(cols, rows, thumbnail) - cols * rows), np.int32)
    return np.concatenate([places, alone])


def spread_places(index_N: Int[np.ndarray, "N"], count: int) -> Int32[np.ndarray, "N"]:
    """Places of tokens that are `index_N` of the `count` in their cell."""
    return (index_N * PLACES // count).astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _relative_map(cols: int, rows: int, side: int, kind: str, thumbnail: bool) -> np.ndarray:
    if min(cols, rows, side) < 1:
        raise ValueError(f"a tile grid needs at least one column, row and token; got {cols}x{rows} of side {side}")
    if kind not in DHR_MAPS:
        raise ValueError(f"the RoPE-DHR map must be one of {DHR_MAPS}, got {kind!r}; set image.dhr_map")
    whole = np.arange(side * side, dtype=np.int32)
    if cols * rows == 1:
        ids = whole
    else:
        axis = _stretched_axis if kind == "code" else _floor_axis
        x, y = axis(cols, side), axis(rows, side)
        cells = y[None, :, :, None] * side + x[:, None, None, :]  # [cols, rows, side, side]: columns outer
        if kind != "code":
            cells = cells.swapaxes(0, 1)  # the order in which tiles are cut; `code` keeps the released mismatch
        tiles = cells.reshape(-1).astype(np.int32)
        ids = np.concatenate([tiles, whole]) if thumbnail else tiles
    ids.setflags(write=False)
    return ids


def _stretched_axis(count: int, side: int) -> np.ndarray:
    """Thumbnail cell of every token along an axis, [count, side]: both ends of a tile's interval are included."""
    width = side / count - 1e-6  # keeps the last token inside the map; needs float64
    return np.stack([np.linspace(i * width, (i + 1) * width, side).astype(np.int64) for i in range(count)])


def _floor_axis(count: int, side: int) -> np.ndarray:
    """Thumbnail cell of every token along an axis, [count, side]: the exact integer map."""
    return (np.arange(count * side) // count).reshape(count, side)


def sequence_positions(
    tokens_T: Int[np.ndarray, "T"],
    grids: Sequence[tuple[int, int]],
    side: int,
    context_id: int,
    rope_dhr: bool = True,
    kind: str = "code",
    thumbnail: bool = True,
) -> tuple[Int32[np.ndarray, "T"], Int32[np.ndarray, "M"]]:
    """Positions of a sequence's tokens and of its visual tokens as memory keys.

    `grids` holds (columns, rows) of each image in order, (1, 1) for a video frame; placeholders are the tokens equal
    to `context_id`. With `rope_dhr` an image advances the counter by side**2 whatever its tile count; without, tokens
    count 0 ... T-1. Raises ValueError where placeholders and images do not fit (CoMemo sec. 3.2).
    """
    placeholder_M = np.flatnonzero(tokens_T == context_id)
    lengths = [tile_count(cols, rows, thumbnail) * side * side for cols, rows in grids]
    if len(placeholder_M) != sum(lengths):
        raise ValueError(
            f"an image gives {side * side} features for each tile, {sum(lengths)} in all for grids "
            f"{[tuple(map(int, grid)) for grid in grids]}, but the text holds {len(placeholder_M)} placeholders"
        )
    if not rope_dhr or not lengths:
        return np.arange(len(tokens_T), dtype=np.int32), placeholder_M.astype(np.int32)
    last = np.cumsum(lengths) - 1
    first = last - lengths + 1
    if np.any(placeholder_M[last] - placeholder_M[first] != last - first):
        raise ValueError("the placeholders of an image must stand next to each other, but text interrupts them")
    steps_T = np.ones(len(tokens_T), np.int32)
    steps_T[placeholder_M] = 0
    steps_T[placeholder_M[last]] = side * side
    positions_T = np.cumsum(steps_T, dtype=np.int32) - steps_T
    visual_positions_M = np.concatenate(
        [
            dhr_map(cols, rows, side, int(positions_T[start]), kind, thumbnail)
            for (cols, rows), start in zip(grids, placeholder_M[first], strict=True)
        ]
    )
    positions_T[placeholder_M] = visual_positions_M
    return positions_T, visual_positions_M


class PatchGrid(NamedTuple):
    """An image or video as visual tokens: `frames` steps of time, each of `rows` x `cols` tokens."""

    frames: int
    rows: int
    cols: int
    seconds: float = 0.0
    """Of a step of time; an image has one step alone."""

    @property
    def tokens(self) -> int:
        return self.frames * self.rows * self.cols

    def thinned(self, stride: int, k: int = 1) -> "PatchGrid":
        """Every `stride`-th step of time, and of it means of k x k tokens, of fewer at the edges."""
        frames, rows, cols = -(-self.frames // stride), -(-self.rows // k), -(-self.cols // k)
        return PatchGrid(frames, rows, cols, self.seconds * stride)

    def owners(self, stride: int, k: int = 1) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "C"]]:
        """Which token of `thinned` stands for each of these, and the first that each stands for; both row-major."""
        time, row, col = np.indices(self[:3]).reshape(3, -1)
        thin = self.thinned(stride, k)
        owner_M = (time // stride * thin.rows + row // k) * thin.cols + col // k
        return owner_M, np.unique(owner_M, return_index=True)[1]


def mrope_positions(
    tokens_T: Int[np.ndarray, "T"],
    grids: Sequence[PatchGrid],
    placeholders: Collection[int],
    tokens_per_second: float,
) -> Int32[np.ndarray, "T 3"]:
    """Time, row and column of each token; `grids` are those of images and videos in the order of their placeholders.

    Text counts on along all three axes. The tokens of an image or video start where the text before them ended, and
    text goes on after the largest position among them; a second of video is `tokens_per_second` positions. Raises
    ValueError where placeholders and grids do not fit (Qwen2.5-VL, arXiv 2502.13923, sec. 2.1).
    """
    is_text_T = ~np.isin(tokens_T, list(placeholders))
    held, given = int((~is_text_T).sum()), sum(grid.tokens for grid in grids)
    if held != given:
        shapes = [tuple(map(int, grid[:3])) for grid in grids]
        raise ValueError(
            f"images and videos of (time, row, column) tokens {shapes} give {given} features, "
            f"but the text holds {held} placeholders"
        )
    waiting = iter(grids)
    positions_T3 = np.zeros((len(tokens_T), 3), np.int32)
    start, count = 0, 0
    while start < len(tokens_T):
        if is_text_T[start]:
            length = int(np.argmin(is_text_T[start:])) or len(tokens_T) - start
            block = np.arange(length)[:, None]
        else:
            grid = next(waiting)
            length = grid.tokens
            if np.any(tokens_T[start : start + length] != tokens_T[start]):
                raise ValueError("the placeholders of an image must stand next to each other, but text interrupts them")
            block = np.indices(grid[:3]).reshape(3, -1).T
            # in fp32 and in this order, as published: it decides which side of a whole number a product falls on
            seconds = block[:, 0].astype(np.float32) * np.float32(grid.seconds)
            block[:, 0] = np.floor(seconds * np.float32(tokens_per_second))
        positions_T3[start : start + length] = count + block
        count = int(positions_T3[start : start + length].max()) + 1
        start += length
    return positions_T3


def window_order(grid: PatchGrid, side: int) -> tuple[Int32[np.ndarray, "M"], Int32[np.ndarray, "M 4"]]:
    """The tokens of an image or video, window after window of at most side x side, and what is known of each then.
    Without a side, 0, a frame is one window.

    First their indices in row-major order; then, for each in the new order: 1 + the index of the first token of its
    window and of its frame, so that equal ids see each other; its row and its column (Qwen2.5-VL sec. 2.1).
    """
    order_N, windows_N = _frame_windows(int(grid.rows), int(grid.cols), int(side))
    first_F1 = np.arange(grid.frames, dtype=np.int32)[:, None] * len(order_N)
    ids = 1 + first_F1 + windows_N, 1 + first_F1, order_N // grid.cols, order_N % grid.cols
    layout_M4 = np.stack(np.broadcast_arrays(*ids), axis=-1).reshape(-1, 4)
    return (first_F1 + order_N).reshape(-1), layout_M4.astype(np.int32)


@functools.lru_cache(maxsize=1024)
def _frame_windows(rows: int, cols: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a frame's tokens in the order of windows; in that order, the place where the window of each begins."""
    row_N, col_N = np.indices((rows, cols)).reshape(2, -1)
    side = side or max(rows, cols)
    window_N = row_N // side * -(-cols // side) + col_N // side
    order_N = np.argsort(window_N, kind="stable").astype(np.int32)
    begins_N = np.searchsorted(window_N[order_N], window_N[order_N]).astype(np.int32)
    for array in (order_N, begins_N):
        array.setflags(write=False)
    return order_N, begins_N
