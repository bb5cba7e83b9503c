"""Pixels that join windows: one stands for each patch, and some are not trusted."""

import numpy as np
import pytest

from vlmem_jax.geometry.samples import edges, samples

GRID = 4


def flat(side, depth=2.0):
    """A wall across the view, one frame, and full confidence."""
    y, x = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    return np.stack([x, y, np.full_like(x, depth)], -1)[None].astype(np.float32), np.ones((1, side, side), np.float32)


@pytest.mark.parametrize("block", [1, 2, 3, 14])
def test_the_pixel_in_the_middle_of_each_patch(block):
    points, confidence = flat(GRID * block)
    confidence *= np.linspace(0.1, 1, GRID * block)
    chosen, weights = samples(points, confidence, GRID)
    middles = np.arange(GRID) * block + block // 2
    wanted = [[x, y, 2.0] for y in middles for x in middles]
    np.testing.assert_array_equal(chosen, [wanted])
    np.testing.assert_allclose(weights[0].reshape(GRID, GRID), confidence[0][np.ix_(middles, middles)])
    assert chosen.dtype == weights.dtype == np.float64


def test_what_is_not_trusted_has_no_weight():
    points, confidence = flat(GRID)
    points[0, 0, 0] = np.nan
    points[0, 0, 1, 2] = np.inf
    points[0, 0, 2, 2] = -1
    confidence[0, 1, 0] = np.nan
    confidence[0, 1, 1] = 0.049
    confidence[0, 1, 2] = 0.051
    chosen, weights = samples(points, confidence, GRID, edge=np.inf)
    np.testing.assert_array_equal(weights[0] > 0, [0, 0, 0, 1, 0, 0, 1, *[1] * 9])
    assert np.isfinite(chosen).all()


@pytest.mark.parametrize("step, cut", [(0.029, False), (0.031, True), (-0.029, False), (-0.031, True)])
def test_edges_are_where_the_depth_leaps(step, cut):
    depths = np.ones((1, 9, 9), np.float32)
    depths[:, :, 5:] += step
    found = edges(depths, 3, 3)[0]  # the middles are 1, 4 and 7, and 4 stands before the leap
    np.testing.assert_array_equal(found, [[False, cut, False]] * 3)


def test_an_edge_costs_its_points_their_weight():
    points, confidence = flat(12)
    points[:, :, 5:, 2] = 3
    _, weights = samples(points, confidence, GRID)
    np.testing.assert_array_equal(weights.reshape(GRID, GRID), [[1, 0, 1, 1]] * GRID)
    assert samples(points, confidence, GRID, edge=1.0)[1].all()
