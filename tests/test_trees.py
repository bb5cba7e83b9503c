"""States whose classes declare their axes, on one that nothing in the package knows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vlmem_jax.runtime.sharding import MeshConfig, lay_out, make_mesh
from vlmem_jax.trees import (
    State,
    axes,
    fitted,
    flatten,
    from_host,
    get_row,
    map_axes,
    put_row,
    to_host,
    unflatten,
)

ROWS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inner(State):
    scores_HB: jax.Array = axes("heads", "batch")
    count: jax.Array = axes()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank(State):
    """Names that say nothing, an axis of its own, and a nested dict."""

    filled: jax.Array = axes("batch")
    t_w: jax.Array = axes("frames_seen", "batch", None)
    banks: dict = axes(of={"near": ("batch", "slots"), "far": {"keys": ("slots", "heads", "batch")}})
    inner: Inner | None = None
    size: int = dataclasses.field(default=3, metadata=dict(static=True))


def bank(rows: int, start: float = 0.0) -> Bank:
    def numbers(*shape: int) -> jax.Array:
        return start + jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)

    banks = {"near": numbers(rows, 6), "far": {"keys": numbers(2, 8, rows)}}
    return Bank(numbers(rows), numbers(5, rows, 3), banks, Inner(numbers(8, rows), jnp.float32(start)))


def by_row(state: Bank) -> list[jax.Array]:
    """The arrays with their rows in front."""
    far = state.banks["far"]["keys"]
    return [
        state.filled,
        state.t_w.swapaxes(0, 1),
        state.banks["near"],
        jnp.moveaxis(far, 2, 0),
        state.inner.scores_HB.T,
    ]


def test_rows_are_split_over_the_mesh_and_axes_of_its_own_are_not():
    with jax.set_mesh(make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))):
        laid = jax.jit(lay_out)(bank(ROWS))
    rows = ("data", "fsdp")
    found = [
        laid.filled,
        laid.t_w,
        laid.banks["near"],
        laid.banks["far"]["keys"],
        laid.inner.scores_HB,
        laid.inner.count,
    ]
    expected = [(rows,), (None, rows), (rows,), (None, "tensor", rows), ("tensor", rows), ()]
    for x, spec in zip(found, expected, strict=True):
        assert x.sharding.is_equivalent_to(jax.NamedSharding(x.sharding.mesh, PartitionSpec(*spec)), x.ndim)


def test_a_state_comes_back_from_the_host_as_it_was():
    state = bank(ROWS)
    arrays = to_host(state)
    assert {"filled", "t_w", "banks/far/keys", "inner/scores_HB"} <= arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, from_host(bank(ROWS, start=9.0), arrays), state)
    with pytest.raises(ValueError, match=r"must hold filled of the shape \(2,\), got \(4,\)"):
        from_host(bank(2), arrays)
    with pytest.raises(ValueError, match="must hold banks/near of the shape .*, got nothing"):
        from_host(state, {name: x for name, x in arrays.items() if name != "banks/near"})


def test_arrays_without_axes_are_named():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Forgetful(State):
        kept: jax.Array

    with pytest.raises(TypeError, match="Forgetful.kept must be a State, or declare its axes"):
        get_row(Forgetful(jnp.zeros(2)), 0)
    with pytest.raises(TypeError, match=r"Bank.filled declares the axes \('batch',\), but has the shape \(2, 2\)"):
        map_axes(lambda x, *_: x, dataclasses.replace(bank(2), filled=jnp.zeros((2, 2))))


def test_nested_dicts_and_paths():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3} and unflatten(flatten(tree)) == tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seat(State):
    """Arrays that all have rows."""

    filled: jax.Array = axes("batch")
    t_w: jax.Array = axes("frames_seen", "batch", None)
    inner: "Seat | None" = None


def seats(rows: int, start: float = 0.0, width: int = 3) -> Seat:
    def of(start: float) -> Seat:
        return Seat(start + jnp.arange(rows), start + jnp.arange(2.0 * rows * width).reshape(2, rows, width))

    return dataclasses.replace(of(start), inner=of(start + 50))


@pytest.mark.parametrize("n", range(ROWS))
def test_a_row_is_put_among_others_and_taken_from_them(n):
    row = seats(1, 1000.0)
    state = jax.jit(put_row)(seats(ROWS), row, n)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(get_row)(state, n), row)
    for other in set(range(ROWS)) - {n}:
        jax.tree.map(np.testing.assert_array_equal, get_row(state, other), get_row(seats(ROWS), other))


def test_a_state_is_fitted_to_a_larger_one_with_zeros():
    small, like = dataclasses.replace(seats(1, 5.0), inner=None), jax.eval_shape(lambda: seats(1, width=6))
    made = fitted(small, like)
    assert jax.tree.map(lambda x: x.shape, made) == jax.tree.map(lambda x: x.shape, like)
    np.testing.assert_array_equal(made.t_w[..., :3], small.t_w)
    assert made.filled == 5 and not made.t_w[..., 3:].any() and not any(map(np.any, jax.tree.leaves(made.inner)))
