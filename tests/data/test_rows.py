import numpy as np
import pytest

from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row, sample_weight
from vlmem_jax.types import IGNORED, Sample, TileShape

TILE, PER_TILE = 2, 4  # pixels, visual tokens


def sample(tokens, targets, tiles=0, first=10, spliced=True):
    """Tokens first, first + 1, ...; the last `targets` are targets; the tokens after the first stand for tiles."""
    tokens_T = np.arange(first, first + tokens, dtype=np.int32)
    labels_T = np.where(np.arange(tokens) >= tokens - targets, tokens_T, IGNORED).astype(np.int32)
    visual_index_T = np.full(tokens, -1, np.int32)
    if spliced:
        visual_index_T[1 : 1 + tiles * PER_TILE] = np.arange(tiles * PER_TILE)
    return Sample(
        tokens_T,
        labels_T,
        positions_T=np.arange(tokens, dtype=np.int32) // 2,
        visual_index_T=visual_index_T,
        pixels_ISSc=np.full((tiles, TILE, TILE, 3), first, np.uint8),
        visual_positions_M=np.arange(tiles * PER_TILE, dtype=np.int32) + first,
    )


def row(*samples, **config):
    return pack_row(samples, DataConfig(**{"pack_tokens": 24, "pack_tiles": 4, **config}), TileShape(TILE, 3, PER_TILE))


def test_samples_follow_each_other_and_padding_comes_last():
    packed = row(sample(10, 2, tiles=2), sample(5, 3, tiles=1, first=50, spliced=False), sample(3, 1, first=90))
    assert packed.text.tokens_BT.tolist() == [*range(10, 20), *range(50, 55), *range(90, 93), *[0] * 6]
    assert packed.text.segments_BT.tolist() == [1] * 10 + [2] * 5 + [3] * 3 + [0] * 6
    assert packed.text.positions_BT.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1, 1, 2, 0, 0, 1, *[0] * 6]
    assert packed.views.pixels_BISSc[:, 0, 0, 0].tolist() == [10, 10, 50, 0]
    assert packed.views.segments_BM.tolist() == [1] * 8 + [2] * 4 + [0] * 4
    assert packed.views.positions_BM.tolist() == [*range(10, 18), *range(50, 54), *[0] * 4]


def test_slots_count_over_the_tiles_of_the_row():
    packed = row(sample(6, 1, tiles=1), sample(12, 1, tiles=2))
    assert packed.text.visual_index_BT.tolist() == [-1, 0, 1, 2, 3, -1, -1, *range(4, 12), *[-1] * 9]


def test_targets_are_the_next_token_and_stay_in_their_sample():
    packed = row(sample(5, 2), sample(4, 4, first=50), loss_weight="token")
    assert packed.text.targets_BT[:9].tolist() == [0, 0, 13, 14, 0, 51, 52, 53, 0]
    assert packed.text.weights_BT[:9].tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0]
    assert not packed.text.weights_BT[9:].any()


@pytest.mark.parametrize("kind, per_token, total", [("token", 1, 4), ("sample", 1 / 4, 1), ("square", 1 / 2, 2)])
def test_loss_weight_of_four_targets(kind, per_token, total):
    weights_T = row(sample(9, 4), loss_weight=kind).text.weights_BT
    assert sorted(set(weights_T.tolist())) == [0, per_token]
    assert weights_T.sum() == total == 4 * sample_weight(kind, 4)


def test_no_sample_gives_a_row_of_padding():
    packed = row()
    assert not any(
        leaf.any()
        for leaf in (packed.text.tokens_BT, packed.text.weights_BT, packed.text.segments_BT, packed.views.pixels_BISSc)
    )
    assert np.all(packed.text.visual_index_BT == -1) and packed.views.segments_BM.shape == (16,)
