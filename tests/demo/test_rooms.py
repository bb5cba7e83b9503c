"""Pictures of rooms against what is known of them."""

import numpy as np
import pytest

from vlmem_jax.demo.mosaics import load_digits
from vlmem_jax.demo.rooms import EYE, HEIGHT, SIDE, Oracle, Path, Poster, Room, draw_room, poses, render
from vlmem_jax.geometry.coordinates import clip_geometry, fault, in_first_camera

YAWS = (0.0, np.pi / 2, np.pi, -np.pi / 2)
"""Turns of cameras that face each wall, radians."""


@pytest.fixture(scope="module")
def rooms():
    pool = load_digits()[0]
    return [draw_room(np.random.default_rng(seed), pool) for seed in range(8)]


def facing(room: Room, poster: Poster, distance: float = 1.6) -> Path:
    """A camera right in front of a poster."""
    place_2 = room.middle(poster)[[0, 2]] + distance * np.array(room.normal(poster))
    return Path(place_2[None], np.array([YAWS[poster.wall]]))


def test_a_poster_is_seen_upright_from_in_front(rooms):
    train, _ = load_digits()
    for room in rooms:
        for number, poster in enumerate(room.posters):
            seen = render(room, facing(room, poster))
            rows, columns = np.nonzero(seen.posters_TSS[0] == number)
            assert abs(columns.mean() - (SIDE - 1) / 2) < 1 and len(rows) > 300
            # the picture of the digit itself, smaller
            inside = seen.pixels_TSSc[0, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].mean(-1)
            side = np.linspace(0.11, 0.89, 9) * len(inside)
            middles = ((side[1:] + side[:-1]) / 2).astype(int)
            ink = 255 - inside[np.ix_(middles, middles)]
            flipped = [
                np.corrcoef(ink.ravel(), other.ravel())[0, 1] for other in (poster.ink_SS, poster.ink_SS[:, ::-1])
            ]
            assert flipped[0] > 0.8 and flipped[0] >= flipped[1]


def test_points_lie_on_the_surfaces_of_the_room(rooms):
    room = rooms[0]
    path = Path(np.array([[2.0, 1.5], [1.0, 3.0]]), np.array([0.3, 2.5]))
    seen = render(room, path)
    for points_SS3, normals_SS3, pose_44 in zip(seen.points_TSS3, seen.normals_TSS3, seen.poses_T44, strict=True):
        world_SS3 = points_SS3 @ pose_44[:3, :3].T + pose_44[:3, 3]
        walls = np.stack([world_SS3, room.size_3 - world_SS3], -1)
        assert walls.min() > -1e-4
        np.testing.assert_allclose(walls.min((-2, -1)), 0, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(normals_SS3, axis=-1), 1, atol=1e-5)
        assert ((normals_SS3 * points_SS3).sum(-1) < 0).all()  # surfaces face the camera


def test_frames_agree_on_where_a_poster_is(rooms):
    """The middle of a poster from two places, in the coordinates of the first camera."""
    room = rooms[1]
    for number, poster in enumerate(room.posters):
        near, far = facing(room, poster, 1.5), facing(room, poster, 2.2)
        path = Path(np.concatenate([near.places_T2, far.places_T2]), np.concatenate([near.yaws_T, far.yaws_T]))
        seen = render(room, path)
        points = in_first_camera(seen.points_TSS3, seen.poses_T44)
        middles = [points[t][seen.posters_TSS[t] == number].mean(0) for t in range(2)]
        np.testing.assert_allclose(middles[0], middles[1], atol=0.05)
        np.testing.assert_allclose(middles[0], [0, poster.height - EYE, 1.5], atol=0.05)


def test_posters_of_a_room_differ_in_colour_and_do_not_overlap(rooms):
    for room in rooms:
        assert len({poster.colour for poster in room.posters}) == len(room.posters)
        for n, one in enumerate(room.posters):
            assert 0 < room.middle(one)[1] < HEIGHT
            assert all(np.abs(room.middle(one) - room.middle(other)).max() > 0.7 for other in room.posters[:n])


def test_the_oracle_tells_what_a_memory_can_use(rooms):
    path = Path(np.array([[2.0, 1.5], [2.0, 2.0]]), np.array([0.0, 0.7]))
    scene = Oracle(16, 12, 4).scene(render(rooms[2], path))
    assert scene.tokens_NPG.shape == (2, 16, 16) and scene.views_NPV.shape == (2, 16, 12)
    assert all(fault(*frame) is None for frame in zip(*scene, strict=True))
    np.testing.assert_allclose(scene.poses_N44[0], np.eye(4), atol=1e-6)
    geometry = clip_geometry(scene, 4, "first")
    assert 0.5 < np.linalg.norm(geometry.coords_BN3, axis=-1).mean() < 2


def test_cameras_look_where_their_yaw_says():
    poses_T44 = poses(Path(np.array([[1.0, 2.0]] * 4), np.array(YAWS)))
    forward = poses_T44[:, :3, 2]
    np.testing.assert_allclose(forward, [[0, 0, 1], [1, 0, 0], [0, 0, -1], [-1, 0, 0]], atol=1e-6)
    assert (np.linalg.det(poses_T44[:, :3, :3]) > 0.99).all()
    np.testing.assert_allclose(poses_T44[:, :3, 3], [[1, EYE, 2]] * 4)
