"""`optimizer.state_dtype="bfloat16"`: half the bytes, and nearly the numbers of fp32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train import standin
from tests.train.test_loop import losses, mesh_of, train
from vlmem_jax.checkpoint import CheckpointConfig, Store
from vlmem_jax.train.config import OptimizerConfig
from vlmem_jax.train.optimizer import in_bfloat16, make_optimizer, round_by_chance
from vlmem_jax.trees import flatten


def configs(name="adamw", **changes):
    return (OptimizerConfig(name, state_dtype=dtype, **changes) for dtype in ("float32", "bfloat16"))


def run(folder, config, **changes):
    """Losses of the stand-in, in the order of the steps."""
    rarely = dict(checkpoint=CheckpointConfig(every=1000, keep_best=0), eval_every=1000)
    train(folder, standin.experiment(optimizer=config, **{**rarely, **changes}))
    return list(losses(folder).values())


@pytest.mark.parametrize("value", [1.0 + 0.3 / 128, -(1.0 + 0.3 / 128), 3.7e-12, 5.1e20])
def test_rounding_by_chance_is_right_on_average_and_goes_to_a_neighbour(value):
    x = jnp.full((64, 32), value, jnp.float32)
    rounded = np.stack([np.asarray(round_by_chance(x, jnp.int32(seed)), np.float64) for seed in range(50)])
    low, high = np.unique(rounded)
    assert low < x[0, 0] < high and high - low <= abs(value) / 128
    spread = (high - low) / 2 / np.sqrt(rounded[0].size)
    means = rounded.mean((1, 2))
    assert abs(means.mean() - np.float64(x[0, 0])) < 4 * spread / np.sqrt(50), "over steps"
    assert np.all(abs(means - np.float64(x[0, 0])) < 5 * spread), "over positions"
    assert abs(np.corrcoef(rounded[0].ravel(), rounded[1].ravel())[0, 1]) < 0.1, "steps know nothing of each other"


def test_what_bfloat16_holds_stays_as_it_is():
    x = jnp.array([0.0, -0.0, 1.0, -2.5, 2.0**-126, jnp.inf], jnp.float32)
    for seed in range(20):
        np.testing.assert_array_equal(round_by_chance(x, jnp.int32(seed)).astype(jnp.float32), x)


def test_the_second_moment_follows_gradients_that_stay_and_that_fall():
    size, steps, later, spread = 2000, 3000, np.array([[1.0], [0.1]]), np.array([0.06, 0.12])
    adam = optax.scale_by_adam(b2=0.999)
    optimizers = adam, in_bfloat16(adam)

    def step(states, n):
        grads = {"x": jnp.where(n < steps // 3, 1.0, later) * jax.random.normal(jax.random.key(n), (size,))}
        return [each.update(grads, state)[1] for each, state in zip(optimizers, states, strict=True)], None

    start = [each.init({"x": jnp.zeros((len(later), size))}) for each in optimizers]
    states, _ = jax.lax.scan(step, start, jnp.arange(steps))
    exact, ours = (
        np.asarray(x, np.float64) for path, x in jax.tree.leaves_with_path(states) if "nu" in jax.tree_util.keystr(path)
    )
    relative = ours / exact
    assert (abs(relative.mean(axis=1) - 1) < 0.01).all()
    assert (relative.std(axis=1) < spread).all()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_takes_half_the_bytes(name):
    model = standin.Model()
    params, axes = flatten(model.abstract()), flatten(model.axes())

    def nbytes(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim)

    full, half = (
        nbytes(jax.eval_shape(make_optimizer(config, lambda step: 0.1, axes).init, params)) for config in configs(name)
    )
    assert half * 2 == full >= nbytes(params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_training_reaches_about_the_same_loss(tmp_path, name):
    full, half = (run(tmp_path / config.state_dtype, config, steps=60, learning_rate=3e-2) for config in configs(name))
    assert full[0] == half[0] and full != half
    assert half[-1] < half[0] * 0.7
    np.testing.assert_allclose(half[-1], full[-1], rtol=0.05)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Losses of a run on one device that nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole"), tuple(configs())[1])


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, whole):
    _, config = configs()
    experiment = standin.experiment(optimizer=config)
    train(tmp_path, experiment, until=5)
    train(tmp_path, experiment)
    assert list(losses(tmp_path).values()) == whole


def test_a_mesh_does_not_change_the_chances(tmp_path, whole):
    _, config = configs()
    train(tmp_path, standin.experiment(optimizer=config), mesh=mesh_of(2, 2, 2))
    np.testing.assert_allclose(list(losses(tmp_path).values()), whole, rtol=1e-4)


def test_what_is_frozen_has_no_state(tmp_path):
    _, config = configs(weight_decay=0.1)
    run(tmp_path, config, trainable=("first/", "second/scale"), frozen=(".*bias",))
    (step,) = [step for step in Store(tmp_path / "only").steps() if step == 12]
    stored = (tmp_path / "only" / str(step) / "train" / "_METADATA").read_text()
    assert "scale" in stored and "bias" not in stored and "second', 'kernel" not in stored
