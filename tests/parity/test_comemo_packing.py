"""CoMemo's packed training batch and loss weights against numbers of the published implementation."""

import numpy as np
import pytest
from scipy.special import log_softmax

from vlmem_jax.data import DataConfig
from vlmem_jax.data.rows import pack_row
from vlmem_jax.types import IGNORED, Sample, TileShape
from vlmem_jax.vision import VisionConfig

PADDING_TOKENS, PADDING_TILES = 5, 2
MEAN, STD = np.array(VisionConfig.pixel_mean), np.array(VisionConfig.pixel_std)


@pytest.fixture(scope="module")
def arrays(golden):
    return dict(np.load(golden / "comemo" / "packed_training.npz"))


def samples(arrays):
    """The golden samples, with their pixels taken out of the batch."""
    context, start = int(arrays["special_ids"][2]), 0
    pixels_ISSc = np.round((arrays["batch/pixel_values"].transpose(0, 2, 3, 1) * STD + MEAN) * 255).astype(np.uint8)
    for name in sorted({key.partition("/")[0] for key in arrays if key.startswith("sample")}, key=lambda n: int(n[6:])):
        tokens_T, tiles = arrays[f"{name}/input_ids"], int(arrays[f"{name}/seq_imgs"][0])
        visual_index_T = np.full(len(tokens_T), -1, np.int32)
        visual_index_T[tokens_T == context] = np.arange((tokens_T == context).sum())
        yield Sample(
            tokens_T=tokens_T,
            labels_T=arrays[f"{name}/labels"],
            positions_T=arrays[f"{name}/position_ids"],
            visual_index_T=visual_index_T,
            pixels_ISSc=pixels_ISSc[start : start + tiles],
            visual_positions_M=arrays[f"{name}/cross_attention_media_position_ids"],
            name=name,
        )
        start += tiles


def packed(arrays, loss_weight="square"):
    config = DataConfig(
        pack_tokens=arrays["batch/input_ids"].shape[1] + PADDING_TOKENS,
        pack_tiles=len(arrays["batch/pixel_values"]) + PADDING_TILES,
        loss_weight=loss_weight,
    )
    tile = TileShape(arrays["batch/pixel_values"].shape[-1], 3, int(arrays["side"]) ** 2)
    return pack_row(list(samples(arrays)), config, tile)


def test_layout_of_a_packed_row(arrays):
    row, per_tile = packed(arrays), int(arrays["side"]) ** 2
    count, tiles = arrays["batch/input_ids"].shape[1], len(arrays["batch/pixel_values"])
    np.testing.assert_array_equal(row.text.tokens_BT[:count], arrays["batch/input_ids"][0])
    np.testing.assert_array_equal(row.text.positions_BT[:count], arrays["batch/position_ids"][0])
    segments = np.arange(1, len(arrays["batch/seq_imgs"][0]) + 1)
    np.testing.assert_array_equal(
        row.text.segments_BT[:count], np.repeat(segments, np.diff(arrays["batch/cu_seqlens"][0]))
    )
    memory = arrays["batch/cross_attention_media_position_ids"][0]
    np.testing.assert_array_equal(row.views.positions_BM[: len(memory)], memory)
    tiles_M = np.repeat(segments, arrays["batch/seq_imgs"][0] * per_tile)
    np.testing.assert_array_equal(row.views.segments_BM[: len(memory)], tiles_M)
    normalised = (row.views.pixels_BISSc[:tiles] / 255 - MEAN) / STD
    np.testing.assert_allclose(normalised.transpose(0, 3, 1, 2), arrays["batch/pixel_values"], atol=1e-5)
    assert not row.text.segments_BT[count:].any() and not row.views.segments_BM[len(memory) :].any()


def test_placeholders_take_the_features_of_flagged_tiles_in_order(arrays):
    row, per_tile = packed(arrays), int(arrays["side"]) ** 2
    placeholder_T = row.text.tokens_BT == arrays["special_ids"][2]
    flagged = np.flatnonzero(arrays["batch/image_flags"])
    expected = (flagged[:, None] * per_tile + np.arange(per_tile)).ravel()
    np.testing.assert_array_equal(row.text.visual_index_BT[placeholder_T], expected)
    assert np.all(row.text.visual_index_BT[~placeholder_T] == -1)


@pytest.mark.parametrize("loss_weight", ["token", "sample", "square"])
def test_loss_weights_and_the_loss_they_give(arrays, loss_weight):
    row = packed(arrays, loss_weight)
    expected, count = arrays[f"loss_weight_{loss_weight}"][0], arrays["batch/input_ids"].shape[1]
    np.testing.assert_allclose(row.text.weights_BT[: count - 1], expected[1:], rtol=1e-6)
    assert not row.text.weights_BT[count - 1 :].any()
    labels = arrays["batch/labels"][0, 1:]
    np.testing.assert_array_equal(row.text.targets_BT[: count - 1], np.where(labels == IGNORED, 0, labels))
    entropy = -log_softmax(arrays["logits"][0].astype(np.float64), axis=-1)[
        np.arange(count), row.text.targets_BT[:count]
    ]
    loss = (row.text.weights_BT[:count] * entropy).sum() / row.text.weights_BT.sum()
    np.testing.assert_allclose(loss, arrays[f"loss_{loss_weight}"], rtol=1e-5)
