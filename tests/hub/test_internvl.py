import numpy as np
import pytest

from vlmem_jax import families
from vlmem_jax.families import internvl
from vlmem_jax.families.internvl import read_config
from vlmem_jax.hub.fit import from_arrays


def test_published_sizes():
    """Number of parameters of the released sizes' language model and tower, from their published configs."""
    rules = internvl.name_table(families.resolve({"preset": "comemo_2b", "memory": None}))
    tensors = {name: rule.shape for rule in rules for name in rule.names}
    assert tensors["language_model.model.layers.23.attention.wqkv.weight"] == (4096, 2048)
    assert tensors["language_model.model.tok_embeddings.weight"] == (92553, 2048)
    assert tensors["vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert tensors["mlp1.1.weight"] == (2048, 4096)
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == 2_205_754_368


def test_blocks_stand_before_every_fourth_layer_and_wrap_all():
    names = {name for rule in internvl.name_table(families.resolve({"preset": "comemo_9b"})) for name in rule.names}
    gates = {name for name in names if name.endswith("attn_gate")}
    assert gates == {f"language_model.model.layers.{i}.gated_cross_attn_layer.attn_gate" for i in range(3, 32, 4)}
    assert "language_model.model.layers.0.decoder_layer.attention.wo.weight" in names


def test_arrays_go_to_their_leaves(weights, released_config):
    params = from_arrays(read_config(released_config, {}).model, weights)
    block = "language_model.model.layers.1.gated_cross_attn_layer."
    to_kv = weights[block + "cross_attn.to_kv.weight"]
    heads = released_config["mixin_config"]["num_heads"]
    k_DHC = params["memory"]["blocks"]["attn"]["k"]["kernel"][0]
    np.testing.assert_array_equal(k_DHC, to_kv[: len(to_kv) // 2].reshape(heads, -1, to_kv.shape[1]).transpose(2, 0, 1))
    np.testing.assert_array_equal(params["memory"]["blocks"]["mlp_gate"][0], weights[block + "ff_gate"])
    conv = weights["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(params["vision"]["patch"]["kernel"], conv.transpose(2, 3, 1, 0))


def test_arrays_that_do_not_fit_are_listed(weights, released_config):
    config = read_config(released_config, {}).model
    broken = {name: value for name, value in weights.items() if not name.startswith("mlp1.0")}
    with pytest.raises(ValueError, match=r"(?s)2 differences.*missing: mlp1\.0\.weight.*missing: mlp1\.0\.bias"):
        from_arrays(config, broken)
