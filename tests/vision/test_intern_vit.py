import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.vision import InternViT, VisionConfig
from vlmem_jax.vision.intern_vit import _bicubic_matrix, resample_positions

CONFIG = VisionConfig(width=16, layers=3, heads=2, mlp_width=24, image_size=12, patch_size=3)


def pixels(size, tiles=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(tiles, size, size, 3)), jnp.float32)


def features(vit, pixels):
    return _features(*nnx.split(vit), pixels)


@functools.partial(jax.jit, static_argnums=0)
def _features(graph, state, pixels):
    return nnx.merge(graph, state)(pixels)


def test_patches_are_read_row_by_row():
    """A change in one patch changes the token of that patch before any attention."""
    vit = InternViT(dataclasses.replace(CONFIG, select_layer=0), rngs=nnx.Rngs(0))
    image = np.asarray(pixels(12, 1))
    changed = image.copy()
    changed[0, 3:6, 9:12] += 1  # second row of patches, fourth column
    moved = np.abs(features(vit, changed) - features(vit, image))[0].max(axis=-1)
    assert np.flatnonzero(moved).tolist() == [1 * 4 + 3]


@pytest.mark.parametrize("select_layer, used", [(-1, 3), (-2, 2), (0, 0), (1, 1)])
def test_select_layer_stops_early(select_layer, used):
    config = dataclasses.replace(CONFIG, select_layer=select_layer)
    vit = InternViT(config, rngs=nnx.Rngs(0))
    assert config.layers_used == used
    shorter = InternViT(dataclasses.replace(CONFIG, layers=max(used, 1)), rngs=nnx.Rngs(0))
    if used:
        state = nnx.state(vit)
        state["layers"] = jax.tree.map(lambda leaf: leaf[:used], state["layers"])
        nnx.update(shorter, state)
        np.testing.assert_array_equal(features(shorter, pixels(12)), features(vit, pixels(12)))


@pytest.mark.parametrize("norm, qk_norm", [("rms_norm", False), ("layer_norm", True)])
def test_options_of_larger_towers(norm, qk_norm):
    plain = InternViT(CONFIG, rngs=nnx.Rngs(0))
    other = InternViT(dataclasses.replace(CONFIG, norm=norm, qk_norm=qk_norm), rngs=nnx.Rngs(0))
    found = features(other, pixels(12))
    assert found.shape == (2, 16, 16)
    assert not np.allclose(found, features(plain, pixels(12)), atol=1e-3)


def test_position_table_of_another_size_is_resampled():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1 + 16, 5)), jnp.float32)
    np.testing.assert_array_equal(resample_positions(table, 4), table)
    larger = resample_positions(table, 8)
    assert larger.shape == (65, 5)
    np.testing.assert_array_equal(larger[0], table[0])
    larger_image = InternViT(dataclasses.replace(CONFIG, image_size=24, position_grid=4), rngs=nnx.Rngs(0))
    assert features(larger_image, pixels(24)).shape == (2, 64, 16)


def test_bicubic_weights():
    for source, target in ((4, 8), (8, 4), (5, 7)):
        matrix = _bicubic_matrix(source, target)
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-12)
    # cubic convolution with a = -0.75 half way between two samples (Keys 1981)
    np.testing.assert_allclose(_bicubic_matrix(8, 4)[1, 1:5], [-0.09375, 0.59375, 0.59375, -0.09375], atol=1e-12)
