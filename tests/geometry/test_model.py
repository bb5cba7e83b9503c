import jax.numpy as jnp
import numpy as np
import pytest

from vlmem_jax.geometry import load_geometry, vggt


def near(found, wanted, tolerance):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.std(wanted))


@pytest.fixture(scope="module")
def model(pi3_checkpoint):
    return load_geometry(pi3_checkpoint.folder, dtype="float32")


@pytest.fixture(scope="module")
def scene(model, pi3_checkpoint):
    return model.scene(pi3_checkpoint.images)


def test_a_scene_of_a_checkpoint(model, scene, pi3_checkpoint):
    io, about, (N, H, W, _) = pi3_checkpoint.io, pi3_checkpoint.about, pi3_checkpoint.images.shape
    assert (model.kind, model.patch_size) == ("pi3", about["patch"])
    assert (model.token_width, model.view_width) == (2 * about["dim"], about["cam_out"])
    P = (H // about["patch"]) * (W // about["patch"])
    assert scene.tokens_NPG.shape == (N, P, model.token_width)
    assert scene.views_NPV.shape == (N, P, model.view_width)
    near(scene.points_NHW3, io["local_points"][0], 1e-3)
    near(scene.poses_N44, io["camera_poses"][0], 2e-4)
    near(scene.tokens_NPG, io["hidden_cat"][:N, about["dec_regs"] :], 2e-4)
    assert {x.dtype for x in scene} == {jnp.dtype("float32")}


def test_bytes_are_fractions_of_255(model, pi3_checkpoint):
    shown = np.rint(pi3_checkpoint.images * 255).astype(np.uint8)
    for ours, theirs in zip(model.scene(shown), model.scene(shown.astype(np.float32) / 255), strict=True):
        near(ours, theirs, 1e-4)


def test_confidence_is_computed_where_it_is_asked_for(model, scene, pi3_checkpoint):
    assert (np.asarray(scene.confidence_NHW) == 1).all()
    asked = model.scene(pi3_checkpoint.images, confidence=True)
    near(asked.confidence_NHW, 1 / (1 + np.exp(-pi3_checkpoint.io["conf"][0, ..., 0])), 1e-3)
    np.testing.assert_array_equal(asked.tokens_NPG, scene.tokens_NPG)


def test_a_program_for_each_shape(model, scene, pi3_checkpoint):
    before = model._program._cache_size()
    again = model.scene(pi3_checkpoint.images)
    assert model._program._cache_size() == before
    np.testing.assert_array_equal(again.points_NHW3, scene.points_NHW3)


def test_tokens_of_the_decoder_of_points(model, scene, pi3_checkpoint):
    about, N = pi3_checkpoint.about, len(pi3_checkpoint.images)
    other = load_geometry(pi3_checkpoint.folder, dtype="float32", tokens="point_decoder")
    assert (other.token_width, other.digest) == (about["head_out"], model.digest)
    found = other.scene(pi3_checkpoint.images).tokens_NPG
    near(found, pi3_checkpoint.io["point_hidden"][:N, about["dec_regs"] :], 2e-4)


def test_half_precision_is_near(scene, pi3_checkpoint):
    """Heads stay in fp32, and so do their weights; confidence is not computed here, and equal."""
    model = load_geometry(pi3_checkpoint.folder)
    assert model.params["trunk"]["pairs"]["within"]["mlp"]["fc1"]["kernel"].dtype == jnp.bfloat16
    assert model.params["point_head"]["kernel"].dtype == model.params["encoder"]["positions"].dtype == jnp.float32
    found = model.scene(pi3_checkpoint.images)
    assert found.points_NHW3.dtype == found.poses_N44.dtype == jnp.float32
    for ours, theirs in zip(found, scene, strict=True):
        assert np.abs(ours - theirs).mean() < 0.02 * np.std(theirs) or np.array_equal(ours, theirs)
    assert not np.array_equal(found.points_NHW3, scene.points_NHW3)


def test_images_that_cannot_be_cut_or_are_out_of_range(model):
    with pytest.raises(ValueError, match="for pi3 must be multiples of 14 pixels, got 384x45; .* to 378x42"):
        model.scene(np.zeros((2, 45, 384, 3), np.uint8))
    with pytest.raises(ValueError, match="from 0 to 1, or bytes as uint8; got 0 to 255"):
        model.scene(np.full((1, 14, 14, 3), [0, 7, 255], np.float32))


# --- VGGT -------------------------------------------------------------------------------------------------------------


def test_a_scene_of_a_checkpoint_of_vggt(vggt_checkpoint, monkeypatch):
    io, about, (N, H, W, _) = vggt_checkpoint.io, vggt_checkpoint.about, vggt_checkpoint.images.shape
    monkeypatch.setattr(vggt, "CAMERA_HEADS", about["trunk_heads"])  # the only size that no shape tells
    model = load_geometry(vggt_checkpoint.folder, dtype="float32")
    assert (model.kind, model.token_width, model.view_width) == ("vggt", 2 * about["dim"], 2 * about["dim"])
    scene = model.scene(vggt_checkpoint.images)
    last = io[f"tokens_{about['depth'] - 1}"][0]
    near(scene.tokens_NPG, last[:, about["patch_start_idx"] :], 2e-4)
    near(scene.views_NPV[:, -1], last[:, 0], 2e-4)
    assert (scene.points_NHW3.shape, scene.poses_N44.shape) == ((N, H, W, 3), (N, 4, 4))
    assert (np.asarray(scene.confidence_NHW) == 1).all()
    place = np.einsum("nij,nj->ni", scene.poses_N44[:, :3, :3].swapaxes(1, 2), scene.poses_N44[:, :3, 3])
    near(-place, io["pose_enc"][0, :, :3], 1e-3)


def test_vggt_has_no_decoder_of_points(vggt_checkpoint):
    with pytest.raises(ValueError, match='VGGT has no point_decoder: tokens must be "decoder"'):
        load_geometry(vggt_checkpoint.folder, tokens="point_decoder")
