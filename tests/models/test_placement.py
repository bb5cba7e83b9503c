"""Where a model lies by default, and what is said of heads that do not go round."""

import jax
import pytest

from vlmem_jax.config import ConfigError
from vlmem_jax.families import resolve
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import check_heads, serving_mesh, whole_heads
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings


def model(preset, **changes):
    return VLM(resolve({"preset": preset, **changes}))


@pytest.mark.parametrize(
    "vlm, devices, data, tensor",
    [
        (model("qwen2_5_vl_7b"), 8, 2, 4),  # 4 kv heads
        (model("qwen2_5_vl_7b"), 6, 3, 2),
        (model("qwen2_5_vl_7b", memory={"kind": "vismem", "query_builder": {"heads": 2}}), 8, 4, 2),
        (model("comemo_2b"), 8, 1, 8),
        (model("comemo_2b", memory={"heads": 12}), 8, 2, 4),
        (model("digits"), 8, 8, 1),  # 3 heads
        (model("comemo_2b"), 1, 1, 1),
    ],
)
def test_by_default_heads_go_over_what_shares_them_evenly_and_rows_over_the_rest(vlm, devices, data, tensor):
    found = serving_mesh(vlm, jax.devices()[:devices])
    assert found == MeshConfig(data=data, fsdp=1, context=1, tensor=tensor)
    assert whole_heads(vlm, make_mesh(found, jax.devices()[:devices]), 2, cache=True) == []


def test_heads_that_every_device_holds_are_named_with_their_bytes():
    vlm = model("tiny", vision={"heads": 4})
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))
    [line] = whole_heads(vlm, mesh, 4, cache=True)
    layer = vlm.abstract()["decoder"]["layers"]["attn"]
    places = param_shardings(mesh, vlm.abstract(), vlm.axes())["decoder"]["layers"]["attn"]
    held = sum(4 * layer[name]["kernel"].size for name in "kv")
    assert all(places[name]["kernel"].is_fully_replicated for name in "kv")
    token = 2 * vlm.config.decoder.layers * 2 * 16 * 4
    assert line == (
        f"mesh.tensor=4 does not divide the 2 kv_heads of model.decoder: a device holds all, {held:,} bytes of "
        f"parameters, not {held // 4:,}, and {token:,} bytes of cache for each token of its rows, not {token // 4:,}"
    )
    assert "cache" not in whole_heads(vlm, mesh, 4, cache=False)[0]
    [split] = whole_heads(vlm, make_mesh(MeshConfig(fsdp=2, tensor=4)), 4, cache=False)
    assert f"{held // 2:,} bytes of parameters" in split, "the other side of these is split"


def test_query_heads_must_go_round():
    with pytest.raises(ConfigError, match="mesh.tensor x mesh.context = 8 must divide model.decoder.heads 4"):
        check_heads(model("tiny").config, make_mesh(MeshConfig(fsdp=1, tensor=8)))
