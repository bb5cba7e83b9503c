"""What a patch sees: its frame, nothing of other images or padding; where it stands; what goes on to the decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.positions import PatchGrid, window_order
from vlmem_jax.vision import TOWERS, Qwen3ViT, Qwen3ViTConfig
from vlmem_jax.vision.qwen3_vit import COUNTED_FRAME, frame_sizes

CONFIG = Qwen3ViTConfig(width=16, layers=4, heads=2, mlp_width=24, patch_size=2, position_grid=5, deep_layers=(0, 2))
VIDEO, IMAGE = PatchGrid(2, 3, 5), PatchGrid(1, 4, 4)
PADDING = 3


def layout(*grids):
    """Layout of grids one after the other and some padding."""
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
    vit = Qwen3ViT(config, rngs=nnx.Rngs(0))
    return jax.jit(lambda pixels, where: vit(pixels, where))


def tiles(x_BND):
    """Features of each tile of the only row."""
    return np.asarray(x_BND)[0].reshape(-1, CONFIG.merge**2 * CONFIG.width)


@pytest.mark.parametrize("tile", [0, 17, VIDEO.tokens + 5])
def test_a_patch_sees_its_frame(pixels, tile):
    where, changed = layout(VIDEO, IMAGE), np.array(pixels)
    changed[0, tile] += 1
    before, after = (tower(CONFIG)(x, where) for x in (pixels, changed))
    frames = np.asarray(where)[0, :, 1]
    for features in range(3):
        x, y = ((found.last_BND, *found.deep_VBND)[features] for found in (before, after))
        moved = np.flatnonzero(np.abs(tiles(x) - tiles(y)).max(axis=-1) > 1e-6)
        assert moved.tolist() == np.flatnonzero(frames == frames[tile]).tolist()


def test_padding_and_neighbours_change_nothing(pixels):
    used = VIDEO.tokens
    alone = tower(CONFIG)(pixels[:, : used + PADDING], layout(VIDEO))
    among = tower(CONFIG)(pixels, layout(VIDEO, IMAGE))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(among), strict=True):
        patches = used * CONFIG.merge**2
        np.testing.assert_allclose(one[..., :patches, :], other[..., :patches, :], atol=1e-6)
        assert np.isfinite(other).all()


def test_levels_are_the_outputs_of_their_layers(pixels):
    """A tower that ends after such a layer gives it as its last."""
    where, whole = layout(VIDEO, IMAGE), tower(CONFIG)(pixels, layout(VIDEO, IMAGE))
    vit = Qwen3ViT(CONFIG, rngs=nnx.Rngs(0))
    for level, layer in enumerate(CONFIG.deep_layers):
        short, kept = vit.keeping(pixels, where, layer + 1, "none")
        np.testing.assert_allclose(kept, whole.deep_VBND[level], atol=1e-6)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), short, whole)
    plain = dataclasses.replace(CONFIG, deep_layers=())
    np.testing.assert_allclose(tower(plain)(pixels, where), whole.last_BND, atol=1e-6)


def test_rows_beside_the_patches_go_through_the_last_layers(pixels):
    """A copy of the patch at row and column 0, which sees what that one sees, becomes the same."""
    where, first = layout(VIDEO, IMAGE), 2
    vit = Qwen3ViT(CONFIG, rngs=nnx.Rngs(0))
    whole, kept = vit.keeping(pixels, where, first, "none")
    corner = VIDEO.tokens * CONFIG.merge**2  # of the image
    patches = jnp.repeat(where[..., 1], CONFIG.merge**2, axis=1)
    seen = jnp.concatenate([patches == patches[:, corner, None], jnp.zeros((1, 1), bool)], axis=1)[:, None]
    rows = vit.beside(kept, where, kept[:, corner, None], seen, None, first, "none")
    np.testing.assert_allclose(rows[:, 0], whole.last_BND[:, corner], atol=1e-5)


def test_frames_have_sizes(pixels):
    sizes = np.asarray(frame_sizes(layout(VIDEO, IMAGE)))[0]
    wanted = [(3, 5)] * VIDEO.tokens + [(4, 4)] * IMAGE.tokens + [(1, 1)] * PADDING
    assert sizes.tolist() == [list(size) for size in wanted]


def test_corners_of_the_table_lie_on_the_corners_of_a_frame():
    vit, side = Qwen3ViT(CONFIG, rngs=nnx.Rngs(1)), CONFIG.position_grid
    table = np.asarray(vit.position_embedding[...]).reshape(side, side, -1)
    for grid in (IMAGE, PatchGrid(1, 2, 7), PatchGrid(1, 1, 1)):
        where = layout(grid)
        found, places = np.asarray(vit.positions(where))[0], np.asarray(vit.places(where[..., 2:]))[0]
        last = np.array([grid.rows, grid.cols]) * CONFIG.merge - 1
        for row in (0, 1):
            for col in (0, 1):
                [at] = np.flatnonzero(
                    (places == last * [row, col]).all(-1) & (np.arange(len(places)) < grid.tokens * 4)
                )
                np.testing.assert_allclose(found[at], table[row * (side - 1), col * (side - 1)], atol=1e-6)


def test_gradients_through_a_kernel_are_the_same(pixels):
    where = layout(VIDEO, IMAGE)

    def gradient(implementation):
        graph, state = nnx.split(Qwen3ViT(CONFIG, AttentionConfig(implementation), rngs=nnx.Rngs(0)))

        def size(state):
            return sum((x**2).mean() for x in nnx.merge(graph, state)(pixels, where))

        return jax.jit(jax.grad(size))(state)

    plain = gradient("xla")
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), plain, gradient("tpu_interpret"))


def test_flops_are_those_that_xla_counts():
    """Of a frame of as many tiles as are counted."""
    one = dataclasses.replace(CONFIG, layers=1, deep_layers=(0,))
    made = TOWERS[one.kind]
    vit = made.tower(one, AttentionConfig(), rngs=nnx.Rngs(0))
    merger = made.projector(one, None, 48, rngs=nnx.Rngs(0))
    where = jnp.asarray(window_order(PatchGrid(1, COUNTED_FRAME // 8, 8), 0)[1][None])
    pixels = jnp.zeros((1, COUNTED_FRAME, one.merge, one.merge, one.tile.channels))

    def run(pixels):
        levels = vit(pixels, where)
        return merger(levels.last_BND), merger.deep(levels.deep_VBND)

    counted = jax.jit(run).lower(pixels).compile().cost_analysis()["flops"]
    assert 1.0 < counted / (COUNTED_FRAME * (sum(one.flops) + one.projector_flops(48))) < 1.25


def test_bad_sizes_name_their_key():
    for changes, message in (
        ({"heads": 3}, "width must be a multiple of 4 [*] heads 3, got 16"),
        ({"position_grid": 1}, "position_grid must be at least 2"),
        ({"deep_layers": (2, 1)}, r"deep_layers must rise within 0 to 3, got \(2, 1\)"),
        ({"deep_layers": (0, 4)}, r"deep_layers must rise within 0 to 3, got \(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)
