import numpy as np
import pytest
from PIL import Image

from vlmem_jax.geometry import pictures


def frames(side=24, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def test_the_area_that_patches_cover():
    shown = frames(384, 1)
    np.testing.assert_array_equal(pictures(shown), shown[:, :378, :378])
    with pytest.raises(ValueError, match="at least 28 pixels a side, got 24; let them be resized"):
        pictures(frames(24), 28)


def test_resized_pictures_keep_ramps_and_do_not_smooth():
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None, None] * 10, (1, 24, 24, 3))
    found = pictures(ramp, 21, "resize")
    wanted = ((np.arange(21) + 0.5) * 24 / 21 - 0.5).clip(0, 23) * 10
    np.testing.assert_array_equal(found[0, :, 5, 1], np.rint(wanted))
    # halves of a picture of stripes: pixels between those that are taken leave no trace
    stripes = np.zeros((1, 30, 30, 3), np.uint8)
    stripes[:, 1::3] = 255
    assert (pictures(stripes, 10, "resize") == 255).all()


def test_enlarged_pictures_are_those_of_pillow():
    shown = frames()
    theirs = np.asarray(Image.fromarray(shown[1]).resize((42, 42), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(pictures(shown, 42, "resize")[1].astype(int), theirs, atol=1)
