"""Linear maps."""

import jax
import jax.numpy as jnp
import numpy as np

from vlmem_jax.nn.linear import widen


def test_a_widened_parameter_has_zeros_behind_and_the_gradient_of_its_own_part():
    x = jnp.arange(12.0).reshape(2, 3, 2)
    wide = widen(x, 1, 5, ("embed", "heads", "head_dim"))
    np.testing.assert_array_equal(wide[:, :3], x)
    assert not wide[:, 3:].any()
    weights = jnp.arange(20.0).reshape(2, 5, 2)
    gradient = jax.grad(lambda x: jnp.vdot(weights, widen(x, 1, 5, ("embed", "heads", "head_dim"))))(x)
    np.testing.assert_array_equal(gradient, weights[:, :3])
    assert widen(x, 1, 3, ("embed", "heads", "head_dim")) is x
