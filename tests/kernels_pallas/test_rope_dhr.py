"""The rotation alone, and positions that the thumbnail lends to tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import raster_positions, rope_dhr, rotary_tables
from tests.kernels_pallas import exact


@pytest.mark.parametrize(("implementation", "width"), [("xla", 128), ("tpu_interpret", 128), ("gpu_interpret", 80)])
def test_turns_forward_and_gradients_back(implementation, width):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(2, 150, 3, width)), jnp.float32) for _ in range(2))
    positions = jnp.asarray(rng.integers(0, 32768, (2, 150)))
    for given in (positions, rotary_tables(positions, 1e6, width)):
        y, back = jax.vjp(lambda x, given=given: rope_dhr(x, given, implementation=implementation), x)
        np.testing.assert_allclose(y, exact.turn(np.float64(x), np.asarray(positions), 1e6), atol=1e-5)
        want = exact.turn(np.float64(dy), np.asarray(positions), 1e6, inverse=True)
        np.testing.assert_allclose(back(dy)[0], want, atol=1e-5)


def test_raster_positions_follow_the_tiles_places():
    ids = raster_positions(jnp.array([[2, 3], [1, 1]]), tiles=7, side=4, base=jnp.array([5, 0]))
    tiles = np.asarray(ids[0] - 5).reshape(7, 4, 4)
    for j, i in np.ndindex(3, 2):
        want = [[(j * 4 + a) // 3 * 4 + (i * 4 + k) // 2 for k in range(4)] for a in range(4)]
        np.testing.assert_array_equal(tiles[j * 2 + i], want)
    np.testing.assert_array_equal(tiles[6].ravel(), np.arange(16))
    np.testing.assert_array_equal(ids[1, :16], np.arange(16))


def test_a_head_dim_that_the_kernel_does_not_serve_is_named():
    with pytest.raises(ValueError, match="head dim must be 128, got 64"):
        rope_dhr(jnp.zeros((1, 4, 2, 64)), jnp.zeros((1, 4), jnp.int32), implementation="tpu_interpret")
