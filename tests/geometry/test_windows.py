"""A stream in windows: one world for all of them, what noise does to it, and what comes of windows that cannot be
joined. The model is an oracle of a room, which gives each window a world of its own."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.geometry.room import GRID, SIDE, Oracle, numbers, picture, truth
from vlmem_jax.geometry.coordinates import clip_geometry
from vlmem_jax.geometry.scene import Scene
from vlmem_jax.geometry.windows import Windows, WindowsConfig
from vlmem_jax.trees import from_host, to_host

CONFIG = WindowsConfig(grid=GRID, edge=1.0)
"""So few pixels show steep slopes."""


def walked(see, frames, config=CONFIG):
    """All that comes out of a video of so many frames, and what is kept."""
    windows = Windows(config, see)
    walk, placed = windows.begin(2, 2), []
    for number in range(frames):
        walk, out = windows.push(walk, picture(number))
        placed += out
    walk, out = windows.flush(walk)
    return placed + out, walk


def coords(placed):
    return np.stack([frame.geometry.coords_BN3 for frame in placed])


def joins(placed):
    """Of each window."""
    return list(dict.fromkeys(frame.join for frame in placed))


def off(placed, chosen):
    """Mean distance of frames' points from the truth, in mean distances of the first frame's."""
    chosen = list(chosen)
    return np.linalg.norm(coords([placed[n] for n in chosen]) - truth(chosen), axis=-1).mean()


# --- order and size ---------------------------------------------------------------------------------------------------


def test_every_frame_comes_out_once_in_order_and_soon():
    windows, out = Windows(CONFIG, Oracle()), []
    walk = windows.begin(2, 2)
    for number in range(50):
        walk, placed = windows.push(walk, picture(number))
        out += placed
        assert number - len(out) < CONFIG.stride
    walk, placed = windows.flush(walk)
    out += placed
    assert [frame.number for frame in out] == list(range(50))
    for frame in out:
        assert (frame.geometry.tokens_BNG == frame.number).all() and (frame.geometry.views_BNV == frame.number).all()
        assert frame.geometry.coords_BN3.shape == (GRID**2, 3) and frame.geometry.coords_BN3.dtype == np.float32
    assert windows.flush(walk)[1] == []


def test_windows_are_of_one_size():
    see = Oracle()
    walked(see, 60)
    assert {len(shown) for shown in see.windows} == {10}
    assert see.windows[0] == [0, 1, 2, 3, 4] * 2
    assert see.windows[1] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert see.windows[12] == [0, 40, *range(45, 53)]
    assert see.windows[-1] == [0, 40, *range(52, 60)]  # what is left


def test_a_video_shorter_than_a_window():
    for frames in range(1, 5):
        placed, _ = walked(Oracle(), frames)
        np.testing.assert_allclose(coords(placed), truth(range(frames)), atol=1e-5)


def test_a_stream_goes_on_after_it_was_flushed():
    windows, out = Windows(CONFIG, Oracle()), []
    walk = windows.begin(2, 2)
    for number in range(30):
        walk, placed = windows.push(walk, picture(number))
        walk, rest = windows.flush(walk) if number in (2, 17, 18) else (walk, [])
        out += placed + rest
    assert [frame.number for frame in out] == list(range(len(out)))
    np.testing.assert_allclose(coords(out), truth(range(len(out))), atol=1e-5)


# --- one world --------------------------------------------------------------------------------------------------------


def test_without_noise_the_world_is_exact():
    placed, walk = walked(Oracle(), 1000)
    true = truth(range(1000))
    assert np.abs(coords(placed) - true).max() < 1e-6 * np.abs(true).max()
    assert max(join.residual or 0 for join in joins(placed)) < 1e-5
    assert walk.worlds == 1 and walk.identities == 0


def test_anchors_bound_what_noise_adds_up_to():
    """At 10,000 frames: 0.07 and 0.81, at 500 0.09 and 0.29."""
    steady, _ = walked(Oracle(noise=0.01), 1000)
    chain, _ = walked(Oracle(noise=0.01), 1000, dataclasses.replace(CONFIG, anchors=0))
    early, late = range(80, 120), range(960, 1000)
    assert off(steady, late) < 2 * off(steady, early)
    assert off(chain, late) > 2 * off(chain, early)
    assert off(chain, late) > 3 * off(steady, late)


def attention(pictures):
    """A model whose views all look at each other, in one layer of random weights."""
    rng = np.random.default_rng(0)
    features = np.stack([np.random.default_rng(number).normal(size=8) for number in numbers(pictures)])
    q, k, v = (features @ rng.normal(size=(8, 8)) for _ in range(3))
    weights = np.exp(q @ k.T)
    mixed = (weights / weights.sum(-1, keepdims=True)) @ v
    scene = Oracle()(pictures)
    bent = scene.points_NHW3 * np.exp(mixed[:, None, None, :3])
    return scene._replace(points_NHW3=bent.astype(np.float32), tokens_NPG=np.repeat(mixed[:, None], GRID**2, 1))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_first_window_is_the_model_on_the_same_frames(weighted):
    config = dataclasses.replace(CONFIG, confidence_weighted=weighted)
    pictures = np.stack([picture(number) for number in range(5)])

    def see(pictures):
        scene = attention(pictures)
        return scene._replace(confidence_NHW=scene.confidence_NHW * np.linspace(0.1, 1, SIDE, dtype=np.float32))

    placed, _ = walked(see, 5, config)
    whole = clip_geometry(see(pictures), GRID, "first", weighted)
    np.testing.assert_allclose(coords(placed), whole.coords_BN3, rtol=1e-5, atol=1e-5)
    tokens = np.stack([frame.geometry.tokens_BNG for frame in placed])
    np.testing.assert_allclose(tokens, whole.tokens_BNG, rtol=1e-9)
    others = clip_geometry(see(np.concatenate([pictures, [picture(5)]])), GRID, "first", weighted)
    assert np.abs(coords(placed) - others.coords_BN3[:5]).max() > 1e-3  # views do matter


def test_coordinates_about_the_anchors():
    first, _ = walked(Oracle(), 100)
    see = Oracle()
    anchored, walk = walked(see, 100, dataclasses.replace(CONFIG, coord_frame="anchor"))
    apart = coords(first) - coords(anchored)
    np.testing.assert_allclose(apart, np.broadcast_to(apart[:, :1], apart.shape), atol=1e-5)
    assert np.abs(apart[:5]).max() == 0
    anchors = np.isin(walk.keys.numbers_F, see.windows[-1][:2])
    np.testing.assert_allclose(apart[99, 0], walk.keys.cameras_F3[anchors].sum(0) / 2, atol=1e-5)


# --- windows that cannot be joined ------------------------------------------------------------------------------------


def blinded(*windows, points=9):
    """All but a few of the points of some windows of the stream are uncertain."""

    def spoil(shown, all_points, confidence, poses):
        if max(shown) in windows:
            certain = confidence.reshape(-1)
            certain[:] = 0.01
            confidence[:, 0, 0] = 0.9  # of each frame a point, but not of those that join windows
            confidence[:points, 1, 1] = 0.9

    return spoil


def test_fewer_than_ten_common_points():
    """Frames 41-44 stay as the model gave them, and what follows is joined to those that have a place."""
    placed, walk = walked(Oracle(spoil=blinded(44, points=4)), 80)
    assert [frame.number for frame in placed if frame.join.identity] == [41, 42, 43, 44]
    join = placed[41].join
    assert (join.common, join.residual, join.scale, join.cut, join.world) == (4, None, 1.0, False, 1)
    assert walk.identities == 1 and walk.worlds == 1
    others = [frame for frame in placed if not frame.join.identity]
    np.testing.assert_allclose(coords(others), truth([frame.number for frame in others]), atol=1e-5)
    assert np.isfinite(coords(placed)).all()


def test_common_points_on_one_line():
    def spoil(shown, points, confidence, poses):
        if max(shown) == 44:
            points[:, :, :, :2] = 0
            poses[:] = np.eye(4)

    placed, walk = walked(Oracle(spoil=spoil), 60)
    assert [frame.number for frame in placed if frame.join.identity] == [41, 42, 43, 44]
    assert placed[41].join.common > 10 and placed[41].join.residual is None
    assert walk.identities == 1 and np.isfinite(coords(placed)).all()
    others = [frame for frame in placed if not frame.join.identity]  # none is joined to those on the line
    np.testing.assert_allclose(coords(others), truth([frame.number for frame in others]), atol=1e-5)


def test_where_nothing_has_a_place_any_more_a_world_begins():
    placed, walk = walked(Oracle(spoil=blinded(44, 48, points=4)), 80)
    assert [frame.number for frame in placed if frame.join.identity] == [41, 42, 43, 44]
    assert [frame.number for frame in placed if frame.join.cut] == [45, 46, 47, 48, 49, 50, 51, 52]


@pytest.mark.parametrize("cut", [6, 41, 50, 59])
def test_a_cut_begins_another_world(cut):
    placed, walk = walked(Oracle(cuts=(cut,)), 100)
    fresh = [frame.number for frame in placed if frame.join.cut]
    first = fresh[0]
    assert fresh == list(range(first, first + CONFIG.stride)) and cut <= first <= cut + CONFIG.stride
    assert walk.worlds == 2 and [frame.join.world for frame in placed] == [1] * first + [2] * (100 - first)
    np.testing.assert_allclose(coords(placed[:cut]), truth(range(cut)), atol=1e-5)
    np.testing.assert_allclose(coords(placed[first:]), truth(range(first, 100), first), atol=1e-5)
    assert walk.keys.numbers_F[walk.keys.filled_F].min() == first
    about_anchors, _ = walked(Oracle(cuts=(cut,)), 100, dataclasses.replace(CONFIG, coord_frame="anchor"))
    np.testing.assert_array_equal(coords(about_anchors)[fresh], coords(placed)[fresh])  # which has none yet


def test_noise_is_no_cut_and_a_cut_is_more_than_noise():
    placed, walk = walked(Oracle(noise=0.01, cuts=(70, 150)), 200)
    cuts = sorted({frame.number - frame.number % CONFIG.stride for frame in placed if frame.join.cut})
    assert walk.worlds == 3 and len(cuts) in (2, 4)
    assert max(join.residual or 0 for join in joins(placed) if not join.cut) < CONFIG.cut / 2


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 30])
def test_a_frame_of_no_use_costs_itself_alone(first):
    def spoil(shown, points, confidence, poses):
        for slot, number in enumerate(shown):
            if number == first:
                points[slot, 0, 0] = np.nan
            if number == first + 1:
                poses[slot, 0] *= 2

    placed, walk = walked(Oracle(spoil=spoil), 60)
    assert placed[first].geometry is None and placed[first].fault.startswith("points must be finite")
    assert placed[first + 1].geometry is None and placed[first + 1].fault.startswith("poses must be rigid")
    good = [frame for frame in placed if frame.fault is None]
    assert len(good) == 58 and walk.worlds == 1 and walk.identities == 0
    begin = 2 if first == 0 else 0
    np.testing.assert_allclose(coords(good), truth([frame.number for frame in good], begin), atol=1e-5)


def test_a_model_that_gives_nothing_of_use_at_first():
    def spoil(shown, points, confidence, poses):
        if max(shown) < 10:
            points[:] = np.inf

    placed, walk = walked(Oracle(spoil=spoil), 40)
    assert [frame.number for frame in placed if frame.geometry is None] == list(range(9))
    assert placed[0].join.world == 0 and not placed[9].join.cut
    np.testing.assert_allclose(coords(placed[9:]), truth(range(9, 40), 9), atol=1e-5)


def test_a_model_with_another_grid():
    windows = Windows(WindowsConfig(grid=5), Oracle())
    walk = windows.begin(2, 2)
    with pytest.raises(ValueError, match="must see 5 x 5 patches"):
        windows.flush(windows.push(walk, picture(0))[0])


@pytest.mark.parametrize(
    "keys, why",
    [
        (dict(stride=8), "stride must be at least 1 and below recent.* got stride 8 and recent 8"),
        (dict(stride=0), "stride must be at least 1"),
        (dict(anchors=65), "anchors must be 0 to keyframes.* got anchors 65, keyframes 64"),
        (dict(anchors=-1), "anchors must be 0 to keyframes"),
        (dict(keyframe_every=0), "keyframe_every at least 1"),
    ],
)
def test_windows_that_cannot_be(keys, why):
    with pytest.raises(ValueError, match=why):
        WindowsConfig(**keys)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_saved_after_any_frame_and_restored():
    """A cut and windows that cannot be joined are on the way."""

    def see():
        return Oracle(noise=0.01, cuts=(60,), spoil=blinded(36, points=4))

    windows = Windows(CONFIG, see())
    walk, out = windows.begin(2, 2), []
    for number in range(90):
        walk, placed = windows.push(walk, picture(number))
        out += placed
        file = io.BytesIO()
        np.savez(file, **to_host(walk))
        file.seek(0)
        windows = Windows(CONFIG, see())
        walk = from_host(windows.begin(2, 2), dict(np.load(file)))
    out += windows.flush(walk)[1]
    whole, _ = walked(see(), 90)
    assert [frame[2:] for frame in out] == [frame[2:] for frame in whole]
    np.testing.assert_array_equal(coords(out), coords(whole))


def test_a_walk_is_not_changed_by_what_follows():
    windows = Windows(CONFIG, Oracle())
    _, walk = walked(Oracle(), 44)
    before, after = jax.tree.map(np.copy, walk), walk
    for number in range(44, 100):
        after, _ = windows.push(after, picture(number))
    jax.tree.map(np.testing.assert_array_equal, walk, before)


def test_what_is_kept_does_not_grow():
    still = Oracle()(np.stack([picture(0)] * 10))
    still = still._replace(points_NHW3=still.points_NHW3[[0] * 10], poses_N44=np.stack([np.eye(4)] * 10))
    windows, sizes = Windows(dataclasses.replace(CONFIG, keyframes=16), lambda pictures: still), {}
    walk = windows.begin(2, 2)
    for number in range(2001):
        if number in (0, 200, 2000):
            sizes[number] = {name: (x.nbytes, x.shape, x.dtype) for name, x in to_host(walk).items()}
        walk, _ = windows.push(walk, picture(number))
    assert sizes[0] == sizes[200] == sizes[2000]
    assert walk.keys.filled_F.all() and walk.keys.numbers_F[0] == 0 and walk.worlds == 1
    assert (np.diff(walk.keys.numbers_F) > 0).all()


def test_arrays_of_jax_are_taken_and_tokens_keep_their_type():
    oracle = Oracle()

    def see(pictures):
        scene = oracle(pictures)
        return Scene(*map(jnp.asarray, scene[:3]), *(jnp.asarray(x, jnp.bfloat16) for x in scene[3:]))

    placed, _ = walked(see, 20)
    np.testing.assert_allclose(coords(placed), truth(range(20)), atol=1e-5)
    assert placed[7].geometry.tokens_BNG.dtype == placed[7].geometry.views_BNV.dtype == jnp.bfloat16
    assert isinstance(placed[7].geometry.tokens_BNG, np.ndarray)
