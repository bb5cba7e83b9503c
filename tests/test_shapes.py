"""The shape checks that all tests run under bite."""

import jax.numpy as jnp
import jaxtyping
import pytest

from vlmem_jax.nn.rope import rotation


@pytest.mark.parametrize("positions", [jnp.zeros(4, jnp.int32), jnp.zeros((1, 4), jnp.float32)], ids=["axes", "dtype"])
def test_arrays_of_other_axes_or_types_than_annotated_are_refused(positions):
    with pytest.raises(jaxtyping.TypeCheckError):
        rotation(positions, jnp.ones(8))
