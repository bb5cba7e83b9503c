"""Loss and gradients of CoMemo's packed training batch against numbers of the published implementation."""

import dataclasses

import comemo_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity import test_comemo_packing as packing
from vlmem_jax.hub.fit import from_arrays
from vlmem_jax.nn.attention import AttentionConfig
from vlmem_jax.train.next_token import next_token_loss
from vlmem_jax.trees import flatten


@pytest.fixture(scope="module")
def case(golden):
    return comemo_golden.load(golden / "comemo", "packed_training")


def batch(arrays, loss_weight="square"):
    """The packed samples, with padding behind them, as a batch of one row."""
    row = packing.packed(arrays, loss_weight)
    return jax.tree.map(lambda x: jnp.asarray(x)[None], row)


def test_logits_of_a_packed_row(case):
    logits = jax.jit(case.vlm.logits)(case.params, batch(case.arrays))
    expected = case.arrays["logits"]
    np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def mean_loss(case):
    """The mean loss of a batch, with logits of so many tokens at once."""
    total = jax.jit(lambda rows, chunk: next_token_loss(case.vlm, case.params, rows, chunk), static_argnums=1)
    return lambda rows, chunk: total(rows, chunk) / rows.text.weights_BT.sum()


@pytest.mark.parametrize("chunk", [16, 10_000])
@pytest.mark.parametrize("loss_weight", ["token", "sample", "square"])
def test_loss(case, mean_loss, loss_weight, chunk):
    loss = mean_loss(batch(case.arrays, loss_weight), chunk)
    np.testing.assert_allclose(loss, case.arrays[f"loss_{loss_weight}"], rtol=1e-5)


def test_loss_of_the_plain_mean_over_targets(case, mean_loss):
    rows = batch(case.arrays, "token")
    rows = rows.replace(weights_BT=(rows.text.weights_BT > 0).astype(jnp.float32))
    np.testing.assert_allclose(mean_loss(rows, 16), case.arrays["loss_plain_mean"], rtol=1e-5)


@pytest.mark.parametrize(
    "remat, implementation", list(zip(("none", "full", "full"), comemo_golden.IMPLEMENTATIONS, strict=True))
)
def test_gradient_of_every_parameter(case, remat, implementation):
    changes = dict(remat=remat, attention=AttentionConfig(implementation))
    vlm = dataclasses.replace(case.vlm, config=dataclasses.replace(case.vlm.config, **changes))
    rows = batch(case.arrays, "square")
    total = float(rows.text.weights_BT.sum())
    grads = jax.jit(jax.grad(lambda params: next_token_loss(vlm, params, rows, 32) / total))(case.params)
    arrays = {
        key.removeprefix("grad_square/"): value for key, value in case.arrays.items() if key.startswith("grad_square/")
    }
    expected = flatten(from_arrays(vlm.config, arrays))
    grads = flatten(grads)
    assert grads.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(grads[path], value, atol=2e-5, rtol=1e-4, err_msg=path)
