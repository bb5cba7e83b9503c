import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vlmem_jax.decoder import Decoder, DecoderConfig
from vlmem_jax.nn.lora import Adapters, LoRA, LoRAConfig
from vlmem_jax.nn.rope import frequencies, rotation
from vlmem_jax.nn.stack import stack

DECODER = DecoderConfig(vocab=32, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=24, qkv_bias=True)
ALL = LoRAConfig(rank=3, alpha=6.0, dropout=0.5, targets=("q", "k", "v", "o", "gate", "up", "down"))
ROWS, LENGTH = 3, 7


@pytest.fixture(scope="module")
def decoder():
    return Decoder(DECODER, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def adapters():
    """Two, with B's that are not zero."""
    made, rng = [], np.random.default_rng(0)
    for n in range(2):
        adapter = stack(lambda rngs: LoRA(ALL, DECODER.linear_maps, rngs=rngs), DECODER.layers, nnx.Rngs(n))
        for target in ALL.targets:
            b = getattr(adapter, target)["b"]
            b[...] = jnp.asarray(rng.normal(0, 0.2, b.shape), jnp.float32)
        made.append(adapter)
    return made


@pytest.fixture(scope="module")
def x_BTD():
    return jax.random.normal(jax.random.key(5), (ROWS, LENGTH, DECODER.width))


def run(decoder, x_BTD, lora=None):
    return _run(*nnx.split(decoder), x_BTD, lora)


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, x_BTD, lora):
    B, T = x_BTD.shape[:2]
    tables = rotation(jnp.broadcast_to(jnp.arange(T), (B, T)), frequencies(DECODER.head_dim, 1e4))
    return nnx.merge(graph, state)(x_BTD, tables, jnp.ones((B, T), jnp.int32), lora=lora)[0]


def with_merged(decoder, adapter):
    """The decoder whose weights are W + scale A B."""
    merged = nnx.clone(decoder)
    for target in ALL.targets:
        linear = getattr(merged.layers.attn if target in "qkvo" else merged.layers.mlp, target)
        a, b = (np.asarray(getattr(adapter, target)[name][...]) for name in "ab")
        linear.kernel[...] = np.asarray(linear.kernel[...]) + ALL.scale * (a @ b).reshape(linear.kernel.shape)
    return merged


def test_each_row_goes_through_its_own_adapter(decoder, adapters, x_BTD):
    found = run(decoder, x_BTD, Adapters.of([ALL] * 2, adapters, jnp.array([1, 0, 1])))
    for row, index in enumerate((1, 0, 1)):
        wanted = run(with_merged(decoder, adapters[index]), x_BTD[row : row + 1])
        np.testing.assert_allclose(found[row], wanted[0], atol=1e-5)
    assert np.abs(found - run(decoder, x_BTD)).max() > 0.1


def test_a_fresh_adapter_changes_nothing(decoder, x_BTD):
    fresh = stack(lambda rngs: LoRA(ALL, DECODER.linear_maps, rngs=rngs), DECODER.layers, nnx.Rngs(0))
    lora = Adapters.of([ALL], [fresh], jnp.zeros(ROWS, jnp.int32))
    np.testing.assert_array_equal(run(decoder, x_BTD, lora), run(decoder, x_BTD))


def test_only_the_targets_have_parameters():
    config = dataclasses.replace(ALL, targets=("q", "v"))
    found = nnx.to_pure_dict(nnx.state(LoRA(config, DECODER.linear_maps, rngs=nnx.Rngs(0))))
    assert jax.tree.map(lambda x: x.shape, found) == {
        "q": {"a": (16, 3), "b": (3, 32)},
        "v": {"a": (16, 3), "b": (3, 16)},
    }


def test_dropout_needs_a_key(decoder, adapters, x_BTD):
    index = jnp.zeros(ROWS, jnp.int32)
    without = run(decoder, x_BTD, Adapters.of([ALL] * 2, adapters, index))
    several = [run(decoder, x_BTD, Adapters.of([ALL] * 2, adapters, index, jax.random.key(n))) for n in (0, 0, 1)]
    np.testing.assert_array_equal(several[0], several[1])
    assert not np.allclose(several[0], several[2]) and not np.allclose(several[0], without)
    off = dataclasses.replace(ALL, dropout=0.0)
    np.testing.assert_array_equal(
        run(decoder, x_BTD, Adapters.of([off] * 2, adapters, index, jax.random.key(0))), without
    )


@pytest.mark.parametrize("changes", [dict(rank=0), dict(dropout=1.0), dict(targets=()), dict(targets=("q", "q"))])
def test_bad_settings_name_their_key(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        LoRAConfig(**changes)
