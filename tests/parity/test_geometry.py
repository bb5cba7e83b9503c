"""pi3 and VGGT against the numbers of their public code: stages of the trunk, heads, views in another order."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.geometry import pi3
from vlmem_jax.geometry.blocks import grid_positions, places_of, turned
from vlmem_jax.geometry.cameras import nearest_rotation
from vlmem_jax.geometry.encoder import normalised, resized_positions
from vlmem_jax.hub.fit import assemble

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
        places, width, special = model.places(images_NHWc), config.trunk.width, config.registers
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


def test_places_in_a_view(pi3_world):
    about, io = pi3_world.about, pi3_world.io
    positions = grid_positions(about["H"] // about["patch"], about["W"] // about["patch"], about["dec_regs"])
    for view in io["rope_positions"]:
        np.testing.assert_array_equal(positions, view)
    places = places_of(io["rope_pos"].astype(np.int32), io["rope_in"].shape[-1])
    found = turned(jnp.asarray(io["rope_in"]).swapaxes(1, 2), places).swapaxes(1, 2)
    np.testing.assert_allclose(found, io["rope_out"], **UNIT)


def test_the_nearest_rotation(pi3_world):
    io = pi3_world.io
    found = nearest_rotation(jnp.asarray(io["svd_in"]))
    np.testing.assert_allclose(found, io["svd_out"], atol=2e-5)
    np.testing.assert_allclose(np.linalg.det(found), 1, atol=1e-5)
