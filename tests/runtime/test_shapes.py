import pytest

from vlmem_jax.runtime.shapes import PoolShape, least, powers
from vlmem_jax.types import TileShape


def test_sizes_are_few_and_hold_all_that_there_is_room_for():
    shape = PoolShape.of(slots=8, longest=3000, tiles=5, forced=3)
    assert shape == PoolShape(8, 3072, 512, 6, 16)
    assert shape.text_sizes == (64, 128, 256, 512) and shape.more_sizes == (64, 512)
    assert shape.tile_sizes(TileShape(28, 3, 4)) == (1, 2, 4, 6)
    assert shape._replace(tiles=96).tile_sizes(TileShape(28, 3, 4, layout=True)) == (64, 96)
    assert shape._replace(tiles=0).tile_sizes(TileShape(28, 3, 4)) == ()


def test_a_small_pool_reads_at_once_what_fits_it():
    shape = PoolShape.of(slots=1, longest=40)
    assert shape.capacity == shape.chunk == 64 and shape.text_sizes == shape.more_sizes == (64,)


@pytest.mark.parametrize("largest", [1, 7, 64, 100])
def test_the_least_size_that_holds_it(largest):
    for size in range(1, largest + 1):
        found = least(powers(4, largest), size)
        assert size <= found <= max(largest, 4) and (found < 2 * size or found <= 4)
