import numpy as np
import pytest

from vlmem_jax.records import Rule
from vlmem_jax.trees import flatten, unflatten


def rule(pattern, sizes, **more):
    return Rule("ours", ("theirs",), pattern, sizes, **more)


def test_a_pattern_transposes_and_drops_axes_of_one():
    tensor = np.arange(24).reshape(1, 4, 6)
    found = rule("1 F D -> D F", {"F": 4, "D": 6})
    assert found.shape == (1, 4, 6) and found.our_shape == (6, 4)
    np.testing.assert_array_equal(found.view(tensor), tensor[0].T)


def test_interleaved_heads_come_apart_in_the_order_group_then_member():
    """Rows of a fused projection: for each of 2 kv heads its 3 query heads, then its key, then its value."""
    sizes = {"K": 2, "R": 5, "C": 4, "D": 7}
    W = np.arange(2 * 5 * 4 * 7).reshape(40, 7)
    query = rule("(K R C) D -> D (K R) C", sizes, pick={"R": slice(3)})
    value = rule("(K R C) D -> D K C", sizes, pick={"R": 4})
    assert query.our_shape == (7, 6, 4) and value.our_shape == (7, 2, 4)
    q_DHC = query.view(W).reshape(query.our_shape)
    for head in range(6):
        first_row = (head // 3 * 5 + head % 3) * 4
        np.testing.assert_array_equal(q_DHC[:, head], W[first_row : first_row + 4].T)
    np.testing.assert_array_equal(value.view(W)[:, 1], W[36:40].T)


@pytest.mark.parametrize("pick", [{"R": slice(3)}, {"R": 3}])
def test_assigning_to_a_view_writes_the_tensor(pick):
    part = rule("(K R C) D -> D (K R) C", {"K": 2, "R": 5, "C": 4, "D": 7}, pick=pick)
    if isinstance(pick["R"], int):
        part = rule("(K R C) D -> D K C", {"K": 2, "R": 5, "C": 4, "D": 7}, pick=pick)
    source, target = np.random.default_rng(0).normal(size=(40, 7)), np.zeros((40, 7))
    part.view(target)[...] = part.view(source)
    rows = np.zeros((2, 5, 4, 7), bool)
    rows[:, pick["R"]] = True
    np.testing.assert_array_equal(target, np.where(rows.reshape(40, 7), source, 0))


def test_stacked_shapes_lead_with_the_number_of_layers():
    assert Rule("a", ("t.0", "t.1", "t.2"), "F D -> D F", {"F": 4, "D": 6}, stacked=True).our_shape == (3, 6, 4)


def test_nested_and_flat_are_inverse():
    leaves = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert unflatten(leaves) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flatten(unflatten(leaves)) == leaves
