"""RoPE-DHR maps and the walk over a sequence, against plain loops; M-RoPE and windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmem_jax.positions import PatchGrid, dhr_map, mrope_positions, sequence_positions, tile_count, window_order

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


# --- M-RoPE and windows -----------------------------------------------------------------------------------------------

IMAGE, VIDEO = 100, 101
grids = st.builds(PatchGrid, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.35, 1.0]))


def shown(grid, placeholder=IMAGE, before=7, after=3):
    return np.array([1] * before + [placeholder] * grid.tokens + [2] * after, np.int32)


def test_an_image_spreads_over_rows_and_columns_and_text_goes_on_behind_the_longest_side():
    positions = mrope_positions(shown(PatchGrid(1, 3, 5)), [PatchGrid(1, 3, 5)], (IMAGE, VIDEO), 2.0)
    assert positions[:7].tolist() == [[n] * 3 for n in range(7)]
    assert positions[7:22].tolist() == [[7, 7 + row, 7 + col] for row in range(3) for col in range(5)]
    assert positions[22:].tolist() == [[n] * 3 for n in (12, 13, 14)]


@pytest.mark.parametrize("seconds, times", [(1.0, [7, 9, 11]), (0.7, [7, 8, 9]), (0.0, [7, 7, 7]), (3.0, [7, 13, 19])])
def test_a_video_takes_time(seconds, times):
    grid = PatchGrid(3, 2, 3, seconds)
    positions = mrope_positions(shown(grid, VIDEO), [grid], (IMAGE, VIDEO), 2.0)
    assert positions[7:25].reshape(3, 6, 3)[..., 0].tolist() == [[time] * 6 for time in times]
    assert positions[25].tolist() == [max(times[-1], 9) + 1] * 3


def test_images_and_videos_take_their_turns():
    first, second = PatchGrid(2, 1, 2, 1.0), PatchGrid(1, 2, 2)
    tokens = np.concatenate([shown(first, VIDEO, 2, 0), shown(second, IMAGE, 1, 1)])
    positions = mrope_positions(tokens, [first, second], (IMAGE, VIDEO), 2.0)
    assert positions[:, 0].tolist() == [0, 1, 2, 2, 4, 4, 5, 6, 6, 6, 6, 8]


def test_text_alone_counts():
    assert mrope_positions(np.arange(4), [], (IMAGE, VIDEO), 2.0).tolist() == [[n] * 3 for n in range(4)]


def test_placeholders_must_match_the_grids():
    with pytest.raises(ValueError, match=r"\[\(1, 2, 2\)\] give 4 features, but the text holds 6 placeholders"):
        mrope_positions(shown(PatchGrid(1, 2, 3)), [PatchGrid(1, 2, 2)], (IMAGE, VIDEO), 2.0)
    with pytest.raises(ValueError, match="next to each other"):
        mrope_positions(np.array([IMAGE, 1, IMAGE]), [PatchGrid(1, 1, 2)], (IMAGE, VIDEO), 2.0)


def test_windows_of_a_small_image():
    order, layout = window_order(PatchGrid(1, 3, 5), 2)
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert layout[:, 0].tolist() == [1] * 4 + [5] * 4 + [9] * 2 + [11] * 2 + [13] * 2 + [15]
    assert set(layout[:, 1]) == {1}


@settings(deadline=None)
@given(grids, st.integers(1, 4))
def test_tokens_of_a_window_are_neighbours_in_its_order(grid, side):
    order, layout = window_order(grid, side)
    assert sorted(order.tolist()) == list(range(grid.tokens))
    frame, place = np.divmod(order, grid.rows * grid.cols)
    row, col = np.divmod(place, grid.cols)
    np.testing.assert_array_equal(layout[:, 2:], np.stack([row, col], axis=1))
    windows, frames = np.stack([frame, row // side, col // side], axis=1), frame[:, None]
    for column, groups in ((0, windows), (1, frames)):
        ids = layout[:, column]
        same = (groups[:, None] == groups[None]).all(axis=-1)
        np.testing.assert_array_equal(ids[:, None] == ids[None], same)
        np.testing.assert_array_equal(ids, 1 + np.argmax(same, axis=1))
        assert (np.diff(ids) >= 0).all()
