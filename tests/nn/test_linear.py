"""Linear maps."""

import jax
import numpy as np
from flax import nnx

from vlmem_jax.nn.linear import Linear


def test_a_part_is_that_entry_of_the_whole():
    linear = Linear({"embed": 5}, {"qkv": 3, "heads": 2, "head_dim": 4}, bias=True, rngs=nnx.Rngs(0))
    linear.bias[...] = jax.random.normal(jax.random.key(1), (3, 2, 4))
    x = jax.random.normal(jax.random.key(2), (2, 7, 5))
    for n in range(3):
        np.testing.assert_allclose(linear.part(x, n), linear(x)[..., n, :, :].reshape(2, 7, 8), atol=1e-6)
