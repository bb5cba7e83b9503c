"""Products that resize: what each part of a length takes of others."""

import numpy as np
import pytest

from vlmem_jax.nn.resize import area_weights


@pytest.mark.parametrize(("source", "target"), [(27, 14), (6, 3), (5, 3), (4, 4)])
def test_parts_are_means_of_what_they_cover(source, target):
    weights = area_weights(source, target)
    np.testing.assert_allclose(weights.sum(1), 1)
    fine = np.repeat(np.random.default_rng(0).normal(size=source), target)  # each part as `target` pieces
    np.testing.assert_allclose(weights @ fine[::target], fine.reshape(target, source).mean(1))
