"""Where a model lies by default."""

import jax
import pytest

from vlmem_jax.config import ConfigError
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import check_heads, serving_mesh
from vlmem_jax.models.presets import resolve
from vlmem_jax.sharding import MeshConfig, make_mesh


def model(preset, **changes):
    return VLM(resolve({"preset": preset, **changes}))


@pytest.mark.parametrize(
    "vlm, devices, data, tensor",
    [
        (model("qwen2_5_vl_7b"), 8, 2, 4),  # 4 kv heads
        (model("qwen2_5_vl_7b"), 6, 3, 2),
        (model("qwen2_5_vl_7b", memory="vismem", vismem={"query_builder": {"heads": 2}}), 8, 4, 2),
        (model("comemo_2b"), 8, 1, 8),
        (model("comemo_2b", comemo={"heads": 12}), 8, 2, 4),
        (model("digits"), 8, 8, 1),  # 3 heads
        (model("comemo_2b"), 1, 1, 1),
    ],
)
def test_by_default_heads_go_over_what_shares_them_evenly_and_rows_over_the_rest(vlm, devices, data, tensor):
    found = serving_mesh(vlm, jax.devices()[:devices])
    assert found == MeshConfig(data=data, fsdp=1, context=1, tensor=tensor)


def test_query_heads_must_go_round():
    with pytest.raises(ConfigError, match="mesh.tensor x mesh.context = 8 must divide model.decoder.heads 4"):
        check_heads(model("tiny").config, make_mesh(MeshConfig(fsdp=1, tensor=8)))
