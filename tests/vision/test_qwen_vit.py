"""What a patch sees: its window, its frame, and nothing of other images or padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.positions import PatchGrid, window_order
from vlmem_jax.vision import QwenViT, QwenViTConfig

CONFIG = QwenViTConfig(width=16, layers=2, heads=2, mlp_width=24, patch_size=2, window=8, full_layers=())
VIDEO, IMAGE = PatchGrid(2, 3, 5), PatchGrid(1, 4, 4)
PADDING = 3


def layout(*grids):
    """Layout of grids one after the other and some padding, and the size of each grid."""
    parts, start = [], 0
    for grid in grids:
        _, one = window_order(grid, CONFIG.geometry.window)
        parts.append(one + [start, start, 0, 0])
        start += grid.tokens
    return jnp.asarray(np.concatenate([*parts, np.zeros((PADDING, 4), int)])[None], jnp.int32)


@pytest.fixture(scope="module")
def pixels():
    tile = CONFIG.tile
    shape = (1, VIDEO.tokens + IMAGE.tokens + PADDING, tile.side, tile.side, tile.channels)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


@functools.cache
def tower(config):
    """A tower's features, as a compiled function of pixels and layout."""
    vit = QwenViT(config, rngs=nnx.Rngs(0))
    return jax.jit(lambda pixels, where: vit(pixels, where))


def moved_by(config, pixels, tile):
    """Which tiles change when this one does."""
    changed, run, where = np.array(pixels), tower(config), layout(VIDEO, IMAGE)
    changed[0, tile] += 1
    change = np.abs(run(changed, where) - run(pixels, where))[0].reshape(pixels.shape[1], -1).max(axis=-1)
    return np.flatnonzero(change > 1e-6).tolist()


def same(pixels, column, tile):
    ids = np.asarray(layout(VIDEO, IMAGE))[0, :, column]
    return np.flatnonzero(ids == ids[tile]).tolist()


@pytest.mark.parametrize("tile", [0, 17, VIDEO.tokens + 5])
def test_a_patch_sees_its_window_or_its_frame(pixels, tile):
    assert moved_by(CONFIG, pixels, tile) == same(pixels, 0, tile)
    assert moved_by(dataclasses.replace(CONFIG, full_layers=(1,)), pixels, tile) == same(pixels, 1, tile)
    assert len(same(pixels, 0, tile)) < len(same(pixels, 1, tile))


def test_padding_changes_nothing(pixels):
    vit = tower(dataclasses.replace(CONFIG, full_layers=(0,)))
    used = VIDEO.tokens
    alone = vit(pixels[:, : used + PADDING], layout(VIDEO))
    among = vit(pixels, layout(VIDEO, IMAGE))
    patches = used * CONFIG.merge**2
    np.testing.assert_allclose(alone[:, :patches], among[:, :patches], atol=1e-6)
    assert np.isfinite(among).all()


def test_rows_and_columns_are_told_apart(pixels):
    """Equal patches in other places give other features, by row and by column."""
    vit, where = tower(dataclasses.replace(CONFIG, layers=1)), np.asarray(layout(IMAGE))
    square = pixels[:, : IMAGE.tokens + PADDING]
    for factors in ([1, 1, 3, 1], [1, 1, 1, 3]):
        assert np.abs(vit(square, where * np.int32(factors)) - vit(square, where)).max() > 1e-4


def test_gradients_through_a_kernel_are_the_same(pixels):
    where, config = layout(VIDEO, IMAGE), dataclasses.replace(CONFIG, full_layers=(1,))

    def gradient(implementation):
        graph, state = nnx.split(QwenViT(config, AttentionConfig(implementation), rngs=nnx.Rngs(0)))
        return jax.jit(jax.grad(lambda state: (nnx.merge(graph, state)(pixels, where) ** 2).mean()))(state)

    plain = gradient("xla")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), plain, gradient("tpu_interpret"))
