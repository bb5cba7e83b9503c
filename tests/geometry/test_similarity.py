"""Similarity transforms: what a fit finds, leaves out and refuses, and what may be done with one."""

import numpy as np
import pytest

from tests.geometry.room import turn
from vlmem_jax.geometry.similarity import IDENTITY, LEAST, Similarity, fit, residual

MOVE = Similarity(2.5, turn(np.array([0.4, -1.1, 2.0])), np.array([3.0, -1.0, 40.0]))
CLOSE = dict(rtol=1e-12, atol=1e-12)


def cloud(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3))


def same(found, wanted, **close):
    for mine, its in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, its, **(close or dict(rtol=1e-9, atol=1e-9)))


def test_points_that_were_moved_give_the_move():
    points = cloud(LEAST)
    found = fit(points, MOVE.points(points), np.ones(LEAST))
    same(found, MOVE)
    assert residual(found, points, MOVE.points(points), np.ones(LEAST)) < 1e-12


def test_single_precision_comes_in_and_double_comes_out():
    points = cloud(50).astype(np.float32)
    found = fit(points, MOVE.points(points).astype(np.float32), np.ones(50, np.float32))
    same(found, MOVE, rtol=3e-6, atol=3e-6)
    assert found.rotation_33.dtype == found.shift_3.dtype == np.float64
    np.testing.assert_allclose(found.rotation_33 @ found.rotation_33.T, np.eye(3), **CLOSE)


def test_points_of_no_weight_do_not_count():
    points, there = cloud(30), MOVE.points(cloud(30))
    there[::3] = np.nan
    same(fit(points, there, np.arange(30.0) % 3), MOVE)


def test_weights_are_as_good_as_copies():
    points, there = cloud(20), cloud(20, 1)
    copies = np.arange(1, 21)
    many = points.repeat(copies, 0), there.repeat(copies, 0), np.ones(copies.sum())
    weighted = fit(points, there, copies / 7)
    same(weighted, fit(*many))
    assert residual(weighted, points, there, copies / 7) == pytest.approx(residual(weighted, *many))


def test_no_similarity_nearby_is_better():
    """It is the minimum: small turns, scales and shifts of it leave more."""
    points, weights = cloud(40), np.linspace(0.1, 1, 40)
    there = MOVE.points(points) + 0.3 * cloud(40, 1)
    found = fit(points, there, weights)
    best = residual(found, points, there, weights)
    for axis in np.vstack([np.eye(3), -np.eye(3)]):
        nearby = [
            found._replace(rotation_33=turn(1e-3 * axis) @ found.rotation_33),
            found._replace(shift_3=found.shift_3 + 1e-3 * axis),
            found._replace(scale=found.scale + 1e-3 * axis.sum()),
        ]
        assert all(residual(other, points, there, weights) > best for other in nearby)


def test_mirrored_points_are_turned_not_mirrored():
    points = cloud(20)
    found = fit(points, points * [1, 1, -1], np.ones(20))
    assert np.linalg.det(found.rotation_33) == pytest.approx(1)
    assert found.scale > 0
    assert residual(found, points, points * [1, 1, -1], np.ones(20)) > 0.1


def test_a_flat_wall_is_enough():
    wall = cloud(20) * [1, 1, 0]
    same(fit(wall, MOVE.points(wall), np.ones(20)), MOVE)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "points",
    [cloud(LEAST - 1), np.ones((20, 3)), np.linspace(0, 1, 20)[:, None] * [1.0, 2.0, 3.0], np.zeros((0, 3))],
    ids=["few", "one place", "one line", "none"],
)
def test_what_leaves_it_open_gives_none(points, dtype):
    points, there, weights = points.astype(dtype), MOVE.points(points).astype(dtype), np.ones(len(points))
    assert fit(points, there, weights) is None
    if len(points):  # nor may all of them come from one place, or go there
        assert fit(points, np.ones_like(points), weights) is None
        assert fit(np.ones_like(points), there, weights) is None


def test_residual_is_a_part_of_the_spread():
    points = cloud(1000)
    there = MOVE.points(points) + 0.1 * MOVE.scale * cloud(1000, 1)
    off = residual(MOVE, points, there, np.ones(1000))
    assert off == pytest.approx(0.1, rel=0.05)
    assert residual(MOVE, points, 7 * there + 7 * MOVE.shift_3, np.ones(1000)) != pytest.approx(off)
    larger = Similarity(7 * MOVE.scale, MOVE.rotation_33, 7 * MOVE.shift_3)
    assert residual(larger, points, 7 * there, np.ones(1000)) == pytest.approx(off)
    nowhere = Similarity(0.0, np.eye(3), there.mean(0))
    assert residual(nowhere, points, there, np.ones(1000)) == pytest.approx(1)


def test_one_after_the_other_and_back():
    other = Similarity(0.3, turn(np.array([2.0, 0.1, 0.0])), np.array([0.0, 5.0, 1.0]))
    points = cloud(6).reshape(2, 3, 3)
    np.testing.assert_allclose((other @ MOVE).points(points), other.points(MOVE.points(points)), **CLOSE)
    np.testing.assert_allclose(MOVE.inverse().points(MOVE.points(points)), points, atol=1e-12)
    same(MOVE.inverse() @ MOVE, IDENTITY)


def test_cameras_move_with_what_they_see():
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = turn(np.array([0.0, 1.0, 0.2])), [1.0, 2.0, 3.0]
    moved = MOVE.poses(np.stack([pose, np.eye(4)]))
    seen = cloud(5)
    for before, after in zip([pose, np.eye(4)], moved, strict=True):
        np.testing.assert_allclose(after[:3, :3] @ after[:3, :3].T, np.eye(3), **CLOSE)
        np.testing.assert_array_equal(after[3], [0, 0, 0, 1])
        there = MOVE.points(Similarity.of_camera(before).points(seen))
        np.testing.assert_allclose(Similarity.of_camera(after).points(MOVE.scale * seen), there, **CLOSE)
