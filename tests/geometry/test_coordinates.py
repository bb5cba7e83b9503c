"""What is known of a clip that was seen at once, and what is wrong with geometry of no use. Numbers: tests/parity."""

import numpy as np
import pytest

from tests.geometry.room import GRID, SIDE, Oracle, picture, truth
from vlmem_jax.geometry.coordinates import SMALLEST, clip_geometry, coordinates, fault, patch_means
from vlmem_jax.geometry.scene import Scene


def clip(frames=6, **changes):
    scene = Oracle()(np.stack([picture(number) for number in range(frames)]))
    return scene._replace(**changes)


def test_a_clip_whatever_the_world_of_the_model():
    geometry = clip_geometry(clip(), GRID, "first")
    np.testing.assert_allclose(geometry.coords_BN3, truth(range(6)), rtol=1e-5, atol=1e-5)
    assert geometry.coords_BN3.dtype == np.float32
    np.testing.assert_array_equal(geometry.tokens_BNG[:, 0, 0], range(6))
    assert geometry.tokens_BNG.shape == (6, GRID**2, 4) and geometry.views_BNV.shape == (6, GRID**2, 2)


@pytest.mark.parametrize("scale, frames", [("clip", 6), ("first", 1)])
def test_mean_distance_of_the_clip_or_of_its_first_frame_is_one(scale, frames):
    coords = clip_geometry(clip(), GRID, scale).coords_BN3
    assert np.linalg.norm(coords[:frames], axis=-1).mean() == pytest.approx(1, rel=1e-5)


def test_scale_of_the_model_is_left_alone():
    scene = clip()
    means = patch_means(scene.points_NHW3[:1], GRID)
    np.testing.assert_allclose(clip_geometry(scene, GRID, "none").coords_BN3[:1], means, rtol=1e-5, atol=1e-5)


def test_means_by_confidence():
    rng = np.random.default_rng(0)
    points, weights = rng.normal(size=(1, 4, 6, 3)), rng.uniform(0.1, 1, (1, 4, 6))
    wanted = [
        np.average(points[0, y : y + 2, x : x + 3].reshape(6, 3), 0, weights[0, y : y + 2, x : x + 3].ravel())
        for y in (0, 2)
        for x in (0, 3)
    ]
    np.testing.assert_allclose(patch_means(points, 2, weights), [wanted], rtol=1e-12)
    np.testing.assert_allclose(patch_means(points, 2, 0 * weights), patch_means(points, 2), rtol=1e-12)


def test_a_clip_by_confidence():
    """A pixel of no confidence does not move its patch."""
    scene = clip()
    points, confidence = scene.points_NHW3.copy(), scene.confidence_NHW.copy()
    block = SIDE // GRID
    points[:, ::block, ::block] *= 50
    confidence[:, ::block, ::block] = 0
    confidence[:, 1::block, ::block] = 0.3
    damaged = scene._replace(points_NHW3=points, confidence_NHW=confidence)
    weighted = clip_geometry(damaged, GRID, "none", confidence_weighted=True).coords_BN3
    undamaged = clip_geometry(damaged._replace(points_NHW3=scene.points_NHW3), GRID, "none", confidence_weighted=True)
    np.testing.assert_allclose(weighted, undamaged.coords_BN3, atol=200 * SMALLEST * np.abs(weighted).max())
    assert np.abs(clip_geometry(damaged, GRID, "none").coords_BN3 - weighted).max() > 1


def spoiled(name, number, change):
    """A clip in which one array of a frame is changed in place."""
    scene = clip()
    arrays = scene._asdict() | {name: getattr(scene, name).copy()}
    change(arrays[name][number])
    return Scene(**arrays)


def put(value, *place):
    return lambda x: x.__setitem__(place, value)


@pytest.mark.parametrize(
    "name, change, why",
    [
        ("points_NHW3", put(np.nan, 3, 2, 0), "points must be finite"),
        ("points_NHW3", put(np.inf, 0, 0, 2), "points must be finite"),
        ("confidence_NHW", put(np.nan, 0, 0), "confidence must be finite"),
        ("tokens_NPG", put(np.nan, 4), "tokens must be finite"),
        ("views_NPV", put(-np.inf, 4), "views must be finite"),
        ("poses_N44", put(np.nan, 0, 0), "pose must be finite"),
        ("points_NHW3", put(0.0), "points must lie in front of the camera, got depths of 0 or less"),
        ("points_NHW3", put(-1.0, ..., 2), "points must lie in front of the camera, got depths of 0 or less"),
        ("confidence_NHW", put(0.04), "a point must have a confidence above 0.05, got at most 0.04"),
        ("poses_N44", lambda x: x.__imul__(1.002), "poses must be rigid"),
        ("poses_N44", lambda x: x[0].__imul__(-1), "poses must be rigid.* determinant of -1"),
        ("poses_N44", put(0.1, 3, 0), "poses must be rigid.* last row"),
    ],
)
def test_frames_whose_geometry_is_of_no_use_are_named(name, change, why):
    with pytest.raises(ValueError, match=f"frame 2 of 6: {why}"):
        clip_geometry(spoiled(name, 2, change), GRID)


@pytest.mark.parametrize(
    "name, change",
    [
        ("points_NHW3", put(0.0, slice(1, None))),
        ("confidence_NHW", put(0.0, slice(1, None))),
        ("poses_N44", lambda x: x[:3, :3].__imul__(1.0004)),
    ],
)
def test_one_good_pixel_and_rounded_poses_will_do(name, change):
    assert fault(*(x[2] for x in spoiled(name, 2, change))) is None


def test_points_that_all_lie_in_the_camera():
    with pytest.raises(ValueError, match="mean distance above 0, got 0"):
        coordinates(np.zeros((2, 4, 4, 3)), np.stack([np.eye(4)] * 2), 2, "first")
    assert not coordinates(np.zeros((2, 4, 4, 3)), np.stack([np.eye(4)] * 2), 2, "none").any()


def test_patches_of_another_grid():
    with pytest.raises(ValueError, match="must see 14 x 14 patches, as the tower does, got 49"):
        clip_geometry(clip(), 14)
