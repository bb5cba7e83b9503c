"""Exact search."""

import numpy as np
import pytest

from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.vectors import Vectors, as_stored, nearest


def unit(x_ND):
    return as_stored(x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True))


@pytest.mark.parametrize("seed", range(4))
def test_nearest_is_what_sorting_all_gives(seed):
    rng = np.random.default_rng(seed)
    x_ND, query_D = unit(rng.normal(size=(500, 33))), rng.normal(size=33)
    x_ND[rng.integers(0, 500, 200)] = x_ND[7]
    exact_N = (x_ND.astype(np.float64) * query_D.astype(np.float32)).sum(1)
    for most in 1, 10, 499, 500, 900:
        hits = nearest(x_ND, query_D, most)
        wanted = np.lexsort((np.arange(500), -exact_N.round(6)))[:most]
        assert [hit.number for hit in hits] == wanted.tolist()
        np.testing.assert_allclose([hit.score for hit in hits], exact_N[wanted], atol=1e-5)


def test_equal_vectors_are_equal_wherever_they_stand():
    """In a product with a matrix the last bits depend on the row."""
    rng = np.random.default_rng(0)
    x_ND = np.repeat(unit(rng.normal(size=(1, 1021))), 777, axis=0)
    hits = nearest(x_ND, rng.normal(size=1021), 5)
    assert [hit.number for hit in hits] == [0, 1, 2, 3, 4] and len({hit.score for hit in hits}) == 1


def test_nothing_to_search():
    assert nearest(np.zeros((0, 4), np.float32), np.ones(4), 3) == []
    none = Vectors(np.zeros((0, 0), np.float32), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    assert none.search(np.ones(4), 3) == []


def test_times():
    x_ND = as_stored(np.eye(3)[[0, 0, 0]])
    vectors = Vectors(x_ND, np.array([4, 5, 6]), np.array([0.0, 10.0, np.nan]), np.array([10.0, 20.0, np.nan]))
    query_D = np.eye(3)[0]
    assert [hit.number for hit in vectors.search(query_D, 9)] == [4, 5, 6]
    assert [hit.number for hit in vectors.search(query_D, 9, within=Span(0.0, 19.0))] == [4]
    assert [hit.number for hit in vectors.search(query_D, 9, among=[6, 9])] == [6]


def test_what_is_stored_stays_as_it_is():
    x_ND = unit(np.random.default_rng(0).normal(size=(9, 64)))
    np.testing.assert_array_equal(as_stored(x_ND), x_ND)
