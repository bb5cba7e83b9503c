import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlmem_jax import families
from vlmem_jax.models import VLM
from vlmem_jax.train.config import OptimizerConfig, StageConfig
from vlmem_jax.train.optimizer import clip, global_norm, make_optimizer, make_schedule, matrix_axes
from vlmem_jax.trees import flatten


def rates(**changes):
    stage = StageConfig("s", **{"steps": 100, "learning_rate": 2.0, "warmup_fraction": 0.1, **changes})
    return np.array([make_schedule(stage)(step) for step in range(stage.steps)])


def test_the_rate_rises_and_stays():
    values = rates()
    np.testing.assert_allclose(values[:10], 2 * np.arange(1, 11) / 10, rtol=1e-6)
    assert np.all(values[10:] == 2)


def test_cosine_goes_down_to_the_final_fraction():
    values = rates(schedule="cosine", final_fraction=0.1)
    assert np.all(np.diff(values[10:]) < 0)
    np.testing.assert_allclose(values[55], 2 * 0.55, rtol=1e-6)
    assert 0.2 < values[-1] < 0.21


@pytest.mark.parametrize("config", [OptimizerConfig(), OptimizerConfig(name="muon")])
def test_weight_decay_reaches_every_parameter(config):
    axes = {"a/kernel": ("embed", "mlp"), "a/bias": ("mlp",), "gate": ("scalar",)}
    params = {"a/kernel": jnp.ones((4, 6)), "a/bias": jnp.ones(6), "gate": jnp.ones(1)}
    optimizer = make_optimizer(config, lambda step: 0.5, axes)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in updates.items():
        np.testing.assert_allclose(update, -0.5 * config.weight_decay, rtol=1e-5, err_msg=path)


def test_muon_takes_the_matrices_inside_layers_and_nothing_else():
    flat = flatten(VLM(families.resolve({"preset": "tiny"})).axes())
    muon = {path for path, axes in flat.items() if matrix_axes(path, axes)}
    assert muon >= {"decoder/layers/attn/q/kernel", "vision/layers/mlp/fc1/kernel", "memory/blocks/attn/o/kernel"}
    assert not muon & {"decoder/embed", "decoder/head/kernel", "vision/patch/kernel", "vision/position_embedding"}
    assert all(path.endswith("kernel") for path in muon)


@pytest.mark.parametrize(
    "path, axes, shape, rows",
    [
        ("q/kernel", ("embed", "heads", "head_dim"), (5, 8, 2, 6), 8),  # stacked: 5 layers of [8, 12]
        ("o/kernel", ("heads", "head_dim", "embed"), (2, 6, 8), 12),
        ("qkv/kernel", ("embed", "qkv", "heads", "head_dim"), (5, 8, 3, 2, 6), 8),  # q, k and v for themselves
    ],
)
def test_muon_orthogonalises_the_map_of_each_layer(path, axes, shape, rows):
    path = f"layers/{path}"
    config = OptimizerConfig(name="muon", weight_decay=0.0, muon_rms=0.2)
    optimizer = make_optimizer(config, lambda step: 1.0, {path: axes})
    grads = {path: jax.random.normal(jax.random.key(0), shape)}
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    update = np.asarray(updates[path])
    if "qkv" in axes:
        update = np.moveaxis(update, 2, 0)
    matrices = update.reshape(
        -1, rows, int(np.prod(shape)) // (rows * (15 if "qkv" in axes else shape[0] if len(shape) > 3 else 1))
    )
    singular = np.linalg.svd(matrices, compute_uv=False)
    scale = 0.2 * np.sqrt(max(matrices.shape[1:]))
    assert np.all(singular > 0.5 * scale) and np.all(singular < 1.5 * scale)


def test_muon_treats_layers_apart():
    axes = {"layers/k/kernel": ("embed", "mlp")}
    config = OptimizerConfig(name="muon")
    optimizer = make_optimizer(config, lambda step: 1.0, axes)
    grads = jax.random.normal(jax.random.key(0), (3, 8, 4))
    together, _ = optimizer.update(
        {"layers/k/kernel": grads}, optimizer.init({"layers/k/kernel": grads}), {"layers/k/kernel": grads}
    )
    one = {"layers/k/kernel": grads[1:2]}
    alone, _ = optimizer.update(one, optimizer.init(one), one)
    np.testing.assert_allclose(together["layers/k/kernel"][1:2], alone["layers/k/kernel"], rtol=1e-4, atol=1e-6)


def test_clipping_scales_large_gradients_only():
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    norm = global_norm(grads)
    assert float(norm) == 5
    np.testing.assert_allclose(global_norm(clip(grads, norm, 1.0)), 1.0, rtol=1e-6)
    assert clip(grads, norm, 10.0) == grads
    np.testing.assert_allclose(norm, optax.global_norm(grads))
