"""pi3 and VGGT against the numbers of their public code: stages of the trunk, heads, views in another order."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.spatial.transform import Rotation

from vlmem_jax.geometry import pi3, vggt
from vlmem_jax.geometry.blocks import grid_positions, places_of
from vlmem_jax.geometry.cameras import nearest_rotation
from vlmem_jax.geometry.encoder import normalised, resized_positions
from vlmem_jax.hub.fit import assemble
from vlmem_jax.nn.rope import rotate

UNIT = dict(atol=1e-5, rtol=1e-5)


def close(found, wanted, tolerance):
    """Equal to within `tolerance` standard deviations of all of `wanted`."""
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * wanted.std())


def opened(folder, name):
    """The config, the arrays and the weights of one of the models there."""
    about = json.loads((folder / f"{name}_config.json").read_text())
    return about, *(dict(np.load(folder / f"{name}_{what}.npz")) for what in ("io", "weights"))


def views_of(images_BNcHW):
    """Images of each batch item as the models here take them."""
    return jnp.asarray(images_BNcHW.transpose(0, 1, 3, 4, 2))


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "geometry"


# --- pi3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pi3_world(folder):
    """What the model makes of the images, and what was recorded."""
    about, io, weights = opened(folder, "pi3")
    read = {name: x for name, x in weights.items() if not pi3.UNREAD.match(name)}
    config = pi3.Pi3Config.of_shapes({name: x.shape for name, x in read.items()}, "float32")
    heads = {"trunk": about["heads"], "head": about["head_heads"]}
    blocks = {name: dataclasses.replace(getattr(config, name), heads=count) for name, count in heads.items()}
    block = dataclasses.replace(config.encoder.block, heads=about["heads"])
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, block=block), **blocks)
    graph = nnx.graphdef(nnx.eval_shape(lambda: pi3.Pi3(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(jnp.asarray, assemble(pi3.name_table(config), read))

    @jax.jit
    def run(images_NHWc):
        model, images_NHWc = nnx.merge(graph, params), normalised(images_NHWc)
        N, H, W, _ = images_NHWc.shape
        kept = model.decoded(images_NHWc, (0, config.pairs - 1))
        places, width, special = model.places(images_NHWc, config.head), config.trunk.width, config.registers
        made = {"encoder_tokens": model.encoder(images_NHWc), "hidden_cat": kept[1]}
        made |= {"decoder_block0": kept[0, ..., :width], "decoder_block1": kept[0, ..., width:]}
        made |= {"decoder_prev": kept[1, ..., :width], "decoder_last": kept[1, ..., width:]}
        for name in ("point", "conf", "camera"):
            made[f"{name}_hidden"] = getattr(model, f"{name}_decoder")(kept[1], places)
        made["local_points"] = model.points(made["point_hidden"][:, special:], (N, H, W))
        made["conf"] = model.logits(made["conf_hidden"][:, special:], (N, H, W))[..., None]
        made["camera_poses"] = model.poses(made["camera_hidden"][:, special:])
        return made

    def scene(images_NHWc):
        return jax.jit(lambda images: nnx.merge(graph, params).scene(images, True))(images_NHWc)

    images = views_of(io["images"])
    made = [run(views) for views in images]
    return SimpleNamespace(about=about, io=io, weights=weights, config=config, images=images, made=made, scene=scene)


def stacked(world, name):
    """Of all batch items, in the shape that was recorded."""
    return np.concatenate([np.asarray(made[name]) for made in world.made]).reshape(world.io[name].shape)


def test_sizes_of_pi3_are_read_off_tensors(pi3_world):
    about, config = (
        pi3_world.about,
        pi3.Pi3Config.of_shapes({n: x.shape for n, x in pi3_world.weights.items()}, "float32"),
    )
    assert (config.encoder.layers, 2 * config.pairs, config.head_layers) == (
        about["enc_depth"], about["dec_depth"], about["head_depth"],
    )  # fmt: skip
    assert (config.trunk.width, config.head.width) == (about["dim"], about["head_width"])
    assert (config.point_width, config.camera_width) == (about["head_out"], about["cam_out"])
    assert (config.encoder.registers, config.registers) == (about["enc_regs"], about["dec_regs"])
    assert config.encoder.grid * config.patch_size == about["enc_img"]


@pytest.mark.parametrize(
    "name",
    ["encoder_tokens", "decoder_block0", "decoder_block1", "decoder_prev", "decoder_last", "hidden_cat", "point_hidden",
     "conf_hidden", "camera_hidden"],
)  # fmt: skip
def test_tokens_of_pi3(pi3_world, name):
    close(stacked(pi3_world, name), pi3_world.io[name], 2e-4)


def test_points_confidence_and_cameras_of_pi3(pi3_world):
    io = pi3_world.io
    close(stacked(pi3_world, "conf"), io["conf"], 2e-4)
    close(stacked(pi3_world, "camera_poses"), io["camera_poses"], 2e-4)
    close(stacked(pi3_world, "local_points"), io["local_points"], 1e-3)


def in_world(scene):
    turned = np.einsum("nij,nhwj->nhwi", scene.poses_N44[:, :3, :3], scene.points_NHW3)
    return turned + np.asarray(scene.poses_N44)[:, None, None, :3, 3]


def test_a_scene_of_pi3_and_its_views_in_another_order(pi3_world):
    io, special = pi3_world.io, pi3_world.config.registers
    [images, *_] = pi3_world.images
    scene, N = pi3_world.scene(images), len(images)
    close(in_world(scene), io["points"][0], 1e-3)
    close(scene.confidence_NHW, 1 / (1 + np.exp(-io["conf"][0, ..., 0])), 1e-3)
    close(scene.tokens_NPG, io["hidden_cat"][:N, special:], 2e-4)
    close(scene.views_NPV, io["camera_hidden"][:N, special:], 2e-4)
    moved = pi3_world.scene(images[io["perm"]])
    close(in_world(moved), io["points_of_permuted"][0], 1e-3)
    for ours, theirs in zip(moved, scene, strict=True):
        close(ours, np.asarray(theirs)[io["perm"]], 1e-3)


def test_the_position_table_of_another_grid(pi3_world):
    about, io, table = pi3_world.about, pi3_world.io, pi3_world.weights["encoder.pos_embed"]
    rows, columns = about["H"] // about["patch"], about["W"] // about["patch"]
    np.testing.assert_allclose(
        resized_positions(jnp.asarray(table[0]), rows, columns), io["encoder_pos_embed"][0], **UNIT
    )


def ordered(x_BHTC):
    """Channels as blocks here have them, see `BlockConfig.rope`."""
    x_BTHC = x_BHTC.swapaxes(1, 2)
    return jnp.asarray(x_BTHC.reshape(*x_BTHC.shape[:-1], 2, 2, -1).swapaxes(-2, -3).reshape(x_BTHC.shape))


def test_places_in_a_view(pi3_world):
    about, io = pi3_world.about, pi3_world.io
    positions = grid_positions(about["H"] // about["patch"], about["W"] // about["patch"], about["dec_regs"])
    for view in io["rope_positions"]:
        np.testing.assert_array_equal(positions, view)
    places = places_of(io["rope_pos"].astype(np.int32), io["rope_in"].shape[-1])
    np.testing.assert_allclose(rotate(ordered(io["rope_in"]), places), ordered(io["rope_out"]), **UNIT)


def test_the_nearest_rotation(pi3_world):
    io = pi3_world.io
    found = nearest_rotation(jnp.asarray(io["svd_in"]))
    np.testing.assert_allclose(found, io["svd_out"], atol=2e-5)
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-5)


# --- VGGT -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vggt_world(folder):
    """What the model makes of the images, and what was recorded; `run(images of one batch item)`."""
    about, io, weights = opened(folder, "vggt")
    read = {name: x for name, x in weights.items() if not vggt.UNREAD.match(name)}
    config = vggt.VGGTConfig.of_shapes({name: x.shape for name, x in read.items()}, "float32")
    block, trunk, camera = (
        dataclasses.replace(block, heads=heads)
        for block, heads in (
            (config.encoder.block, about["heads"]), (config.trunk, about["heads"]),
            (config.camera, about["trunk_heads"]),
        )
    )  # fmt: skip
    encoder = dataclasses.replace(config.encoder, block=block)
    config = dataclasses.replace(config, encoder=encoder, trunk=trunk, camera=camera, dense=tuple(about["layer_idx"]))
    graph = nnx.graphdef(nnx.eval_shape(lambda: vggt.VGGT(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(jnp.asarray, assemble(vggt.name_table(config), read))

    @jax.jit
    def run(images_NHWc):
        model, (_, H, W, _) = nnx.merge(graph, params), images_NHWc.shape
        every = model.decoded(normalised(images_NHWc), tuple(range(config.pairs)))
        dense = every[jnp.asarray(config.dense)]
        points, depth, poses = model.points(dense, H, W), model.depth(dense, H, W), model.poses(every[-1])
        made = {f"tokens_{n}": tokens for n, tokens in enumerate(every)}
        made |= {f"pose_enc_iter{n}": pose for n, pose in enumerate(poses)} | {"pose_enc": poses[-1]}
        made |= {"points": points.values_NHWc, "points_conf": 1 + jnp.exp(points.logits_NHW)}
        made |= {"depth": depth.values_NHWc, "depth_conf": 1 + jnp.exp(depth.logits_NHW)}
        return made, model.scene(images_NHWc, True)

    images = views_of(io["images"])
    made, scenes = zip(*map(run, images), strict=True)
    return SimpleNamespace(about=about, io=io, config=config, images=images, made=made, scenes=scenes, run=run)


def test_sizes_of_vggt_are_read_off_tensors(vggt_world):
    about, config = vggt_world.about, vggt_world.config
    assert (config.encoder.layers, config.pairs, config.camera_layers) == (
        about["enc_depth"], about["depth"], about["trunk_depth"],
    )  # fmt: skip
    assert (config.trunk.width, config.registers) == (about["dim"], about["regs"])
    for dense in (config.points, config.depth):
        assert (dense.features, list(dense.channels)) == (about["features"], about["out_channels"])


def test_tokens_and_poses_of_vggt(vggt_world):
    names = [f"tokens_{n}" for n in range(vggt_world.config.pairs)]
    names += [f"pose_enc_iter{n}" for n in range(vggt_world.about["camera_iters"])]
    for name in [*names, "pose_enc"]:
        close(stacked(vggt_world, name), vggt_world.io[name], 2e-4)


@pytest.mark.parametrize("name", ["points", "points_conf", "depth", "depth_conf"])
def test_dense_heads_of_vggt(vggt_world, name):
    close(stacked(vggt_world, name), vggt_world.io[name], 1e-3)


def test_a_scene_of_vggt(vggt_world):
    """Poses turn each camera's points into those that the point head gives, in the frame of the first view."""
    io, special = vggt_world.io, vggt_world.about["patch_start_idx"]
    for n, scene in enumerate(vggt_world.scenes):
        close(in_world(scene), io["points"][n], 1e-3)
        conf = io["points_conf"][n]
        close(scene.confidence_NHW, (conf - 1) / conf, 1e-3)
        last = io[f"tokens_{vggt_world.config.pairs - 1}"][n]
        close(scene.tokens_NPG, last[:, special:], 2e-4)
        close(scene.views_NPV, np.broadcast_to(last[:, :1], last[:, special:].shape), 2e-4)
        turns = np.asarray(scene.poses_N44)[:, :3, :3]
        np.testing.assert_allclose(turns @ turns.swapaxes(1, 2), np.broadcast_to(np.eye(3), turns.shape), atol=1e-5)
        np.testing.assert_allclose(np.linalg.det(turns), 1, atol=1e-5)
        # the pose that was recorded is that of the world as the camera sees it
        quaternion, place = io["pose_enc"][n][:, 3:7], io["pose_enc"][n][:, :3]
        np.testing.assert_allclose(Rotation.from_quat(quaternion).inv().as_matrix(), turns, atol=1e-4)
        back = np.einsum("nij,nj->ni", turns.swapaxes(1, 2), np.asarray(scene.poses_N44)[:, :3, 3])
        close(back, -place, 1e-3)


def test_the_first_view_of_vggt_is_special_and_the_others_are_not(vggt_world):
    [images, *_], [(made, scene), *_] = vggt_world.images, zip(vggt_world.made, vggt_world.scenes, strict=True)
    last = f"tokens_{vggt_world.config.pairs - 1}"
    others = np.array([0, *range(len(images) - 1, 0, -1)])
    turned, moved = vggt_world.run(images[others])
    close(turned[last], np.asarray(made[last])[others], 2e-4)
    close(in_world(moved), in_world(scene)[others], 1e-3)
    back = np.arange(len(images))[::-1]
    turned, moved = vggt_world.run(images[back])
    assert np.abs(turned[last] - np.asarray(made[last])[back]).max() > 0.05 * np.std(made[last])
