"""RoPE-DHR maps and the walk over a sequence, against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmem_jax.positions import dhr_map, sequence_positions, tile_count

GRIDS = [(cols, rows) for cols in range(1, 13) for rows in range(1, 13) if cols * rows <= 12]
CONTEXT = 9


def test_a_two_by_three_image_of_side_four():
    tiles = dhr_map(2, 3, side=4, base=5).reshape(7, 4, 4)
    assert tiles[0].tolist() == [[5, 5, 6, 6], [5, 5, 6, 6], [5, 5, 6, 6], [9, 9, 10, 10]]
    assert tiles[1, 0].tolist() == [9, 9, 10, 10], "the second block is the tile below: columns are outer"
    assert tiles[3, 0].tolist() == [6, 7, 8, 8], "a tile after the first starts one cell back"
    assert tiles[6].ravel().tolist() == list(range(5, 21)), "the thumbnail"


def test_the_raster_map_puts_the_second_tile_to_the_right():
    tiles = dhr_map(2, 3, side=4, kind="raster").reshape(7, 4, 4)
    assert tiles[1, 0].tolist() == [2, 2, 3, 3]
    assert tiles[2, 0].tolist() == [4, 4, 5, 5]


@pytest.mark.parametrize("kind", ["code", "raster"])
@given(grid=st.sampled_from(GRIDS), side=st.integers(1, 17), base=st.integers(0, 40000))
def test_every_token_of_an_image_lies_in_the_thumbnail(grid, side, base, kind):
    ids = dhr_map(*grid, side, base, kind)
    assert len(ids) == tile_count(*grid) * side * side
    assert base <= ids.min() and ids.max() < base + side * side
    np.testing.assert_array_equal(ids[-side * side :], base + np.arange(side * side))


@given(grid=st.sampled_from(GRIDS), side=st.integers(1, 17))
def test_raster_tiles_cover_each_thumbnail_cell_equally(grid, side):
    tiles = dhr_map(*grid, side, kind="raster", thumbnail=False)
    np.testing.assert_array_equal(np.bincount(tiles, minlength=side * side), grid[0] * grid[1])


def test_maps_are_not_shared_with_the_caller():
    dhr_map(2, 2, 4)[:] = -1
    assert dhr_map(2, 2, 4).min() == 0


def test_unknown_map_names_the_knob():
    with pytest.raises(ValueError, match="image.dhr_map"):
        dhr_map(2, 2, 4, kind="diagonal")


@st.composite
def sequences(draw):
    side = draw(st.integers(1, 4))
    tokens, grids = [], []
    for text in draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)):
        tokens += [1] * text + [7]
        grid = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 2)]))
        tokens += [CONTEXT] * (tile_count(*grid) * side * side) + [8]
        grids.append(grid)
    return np.array(tokens, np.int32), grids, side


def walk(tokens, grids, side, kind):
    """The same token by token: an image takes side * side positions whatever its tile count."""
    positions, counter, index, images = [], 0, 0, iter(grids)
    while index < len(tokens):
        if tokens[index] == CONTEXT:
            block = dhr_map(*next(images), side, counter, kind)
            positions.extend(block)
            counter, index = counter + side * side, index + len(block)
        else:
            positions.append(counter)
            counter, index = counter + 1, index + 1
    return positions


@pytest.mark.parametrize("kind", ["code", "raster"])
@given(sequence=sequences())
def test_sequence_equals_a_walk_over_its_tokens(sequence, kind):
    tokens, grids, side = sequence
    positions, memory = sequence_positions(tokens, grids, side, CONTEXT, kind=kind)
    np.testing.assert_array_equal(positions, walk(tokens, grids, side, kind))
    np.testing.assert_array_equal(memory, positions[tokens == CONTEXT])
    assert positions.dtype == memory.dtype == np.int32


@given(sequence=sequences())
def test_without_dhr_tokens_count_up(sequence):
    tokens, grids, side = sequence
    positions, memory = sequence_positions(tokens, grids, side, CONTEXT, rope_dhr=False)
    np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    np.testing.assert_array_equal(memory, np.flatnonzero(tokens == CONTEXT))


def test_a_tiled_image_without_thumbnail_still_takes_the_thumbnails_positions():
    tokens = np.array([1, 7, *[CONTEXT] * 8, 8], np.int32)
    positions, _ = sequence_positions(tokens, [(2, 1)], 2, CONTEXT, thumbnail=False)
    assert positions[1] == 1 and positions[-1] == 2 + 4


def test_video_frames_take_fresh_positions():
    frame = [7, CONTEXT, CONTEXT, CONTEXT, CONTEXT, 8]
    positions, _ = sequence_positions(np.array(frame * 3, np.int32), [(1, 1)] * 3, 2, CONTEXT)
    assert positions.tolist() == list(range(18))


def test_text_alone():
    positions, memory = sequence_positions(np.array([1, 2, 3]), [], 4, CONTEXT)
    assert positions.tolist() == [0, 1, 2] and memory.shape == (0,)


def test_placeholders_must_match_the_images():
    with pytest.raises(ValueError, match=r"12 in all for grids \[\(2, 1\)\], but the text holds 4"):
        sequence_positions(np.array([1, *[CONTEXT] * 4]), [(2, 1)], 2, CONTEXT)


def test_an_image_must_not_be_interrupted():
    with pytest.raises(ValueError, match="next to each other"):
        sequence_positions(np.array([CONTEXT, CONTEXT, 1, CONTEXT, CONTEXT]), [(1, 1)], 2, CONTEXT)
