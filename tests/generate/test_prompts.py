"""Prompts padded to few shapes: what fits, what is padding, what is refused."""

import jax
import numpy as np
import pytest

from tests.patches_world import sample
from vlmem_jax.families import resolve
from vlmem_jax.generate.prompts import pad_prompts
from vlmem_jax.models import VLM
from vlmem_jax.positions import PatchGrid
from vlmem_jax.runtime.shapes import BLOCK_BUCKET, bucket, tile_bucket
from vlmem_jax.types import TileShape

PATCHES = TileShape(side=2, channels=96, tokens=1, layout=True, axes=3)


@pytest.fixture(scope="module")
def vlm():
    return VLM(resolve({"preset": "tiny_qwen2_5_vl"}))


def test_buckets():
    assert [bucket(n) for n in range(10)] == [0, 1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert [bucket(n, 64) for n in (1, 64, 65, 97, 129)] == [64, 64, 96, 128, 192]
    assert [bucket(n, 64, steps=8) for n in (1, 65, 73, 128, 129)] == [64, 72, 80, 128, 144]


def test_little_of_an_image_of_any_size_is_padding():
    sizes = range(BLOCK_BUCKET, 16385)
    found = [tile_bucket(tiles, PATCHES) for tiles in sizes]
    assert max(1 - tiles / slots for tiles, slots in zip(sizes, found, strict=True)) < 0.12
    assert len(set(found)) == 65 and found == sorted(found)


def test_images_of_many_sizes_share_a_shape(vlm):
    grids = [PatchGrid(1, 8, 11), PatchGrid(1, 17, 5), PatchGrid(4, 7, 3), PatchGrid(1, 1, 81)]
    batches = [pad_prompts([sample(vlm, [grid], 20 - n)], 1, vlm.tile) for n, grid in enumerate(grids)]
    shapes = [[leaf.shape for leaf in jax.tree.leaves(batch)] for batch in batches]
    assert all(shape == shapes[0] for shape in shapes) and batches[0].views.pixels_BISSc.shape[1] == 88


def test_rows_are_padded_on_the_right(vlm):
    short, long = sample(vlm, [PatchGrid(1, 2, 3)], 5), sample(vlm, [PatchGrid(1, 4, 4)], 30)
    batch = pad_prompts([short, long], 3, vlm.tile)
    for row, one in enumerate((short, long)):
        length, tiles = len(one.tokens_T), len(one.pixels_ISSc)
        np.testing.assert_array_equal(batch.text.tokens_BT[row, :length], one.tokens_T)
        np.testing.assert_array_equal(batch.text.segments_BT[row], np.arange(batch.text.segments_BT.shape[1]) < length)
        np.testing.assert_array_equal(batch.views.layout_BI4[row, :tiles], one.layout_I4)
        assert not batch.views.layout_BI4[row, tiles:].any() and not batch.views.pixels_BISSc[row, tiles:].any()
    assert not batch.text.segments_BT[2].any()


def test_more_prompts_than_rows_are_refused(vlm):
    with pytest.raises(ValueError, match="2 prompts do not fit a batch of 1 rows"):
        pad_prompts([sample(vlm, [], 3)] * 2, 1, vlm.tile)
