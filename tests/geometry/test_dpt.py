import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmem_jax.geometry.dpt import Residual, coded, resized


def test_maps_keep_their_corners_and_ramps():
    ramp = jnp.arange(5.0)[:, None, None] * 3 + jnp.arange(4.0)[None, :, None]
    found = resized(ramp, (9, 7))
    wanted = np.linspace(0, 12, 9)[:, None] + np.linspace(0, 3, 7)
    np.testing.assert_allclose(found[..., 0], wanted, atol=1e-5)


def test_half_of_the_channels_tell_the_column_and_half_the_row():
    code = np.asarray(coded(jnp.zeros((3, 6, 8)), aspect=2.0)) / 0.1
    assert np.ptp(code[:, :, :4], axis=0).max() == np.ptp(code[:, :, 4:], axis=1).max() == 0
    x, y = 2 / 5**0.5 * 5 / 6, 1 / 5**0.5 * 2 / 3  # of the last column and row
    np.testing.assert_allclose(code[0, -1, :4], [np.sin(x), np.sin(x / 10), np.cos(x), np.cos(x / 10)], atol=1e-6)
    np.testing.assert_allclose(code[-1, 0, 4:], [np.sin(y), np.sin(y / 10), np.cos(y), np.cos(y / 10)], atol=1e-6)
    np.testing.assert_allclose(code[1, :, 4:], [[0, 0, 1, 1]] * 6, atol=1e-6)


def test_what_is_added_is_rectified():
    unit = Residual(2, rngs=nnx.Rngs(0))
    unit.conv2.kernel[...] = jnp.zeros_like(unit.conv2.kernel[...])
    x = jnp.asarray([[[-1.0, 2.0]]])
    np.testing.assert_array_equal(unit(x), [[[0.0, 2.0]]])
