import jax
import pytest
from flax import nnx

from vlmem_jax.geometry.blocks import BlockConfig
from vlmem_jax.geometry.encoder import EncoderConfig
from vlmem_jax.geometry.pi3 import Pi3, Pi3Config

RELEASED = Pi3Config(
    encoder=EncoderConfig(BlockConfig(1024, 16, 4096), layers=24, grid=37, registers=4),
    trunk=BlockConfig(1024, 16, 4096, qk_norm=True, rope=True), pairs=18, registers=5,
    head=BlockConfig(1024, 16, 4096, layer_scale=False, rope=True), head_layers=5,
    point_width=1024, camera_width=512, camera_layers=2,
)  # fmt: skip


def test_the_released_model_has_as_many_values_as_are_published():
    state = nnx.state(nnx.eval_shape(lambda: Pi3(RELEASED, rngs=nnx.Rngs(0))))
    sizes = {part: sum(x.size for x in jax.tree.leaves(state[part])) for part in state}
    assert sizes["encoder"] == 304_371_712
    assert sizes["trunk"] == 453_547_008
    assert sizes["point_decoder"] == sizes["conf_decoder"] == 66_128_896
    assert sizes["camera_decoder"] == 65_604_096
    assert (sizes["point_head"], sizes["conf_head"], sizes["camera_head"]) == (602_700, 200_900, 2_107_404)
    assert sum(sizes.values()) == 958_696_738 - 6  # means and deviations of colours


def test_flops_grow_with_views_by_attention_over_all_of_them():
    each = RELEASED.flops(32, 378, 378) / 32
    assert each == pytest.approx(2.78e12, rel=2e-3)
    alone, without = RELEASED.flops(1, 378, 378), RELEASED.flops(1, 378, 378, confidence=False)
    tokens = 5 + 27 * 27
    assert each - alone == pytest.approx(18 * 4 * tokens**2 * 1024 * 31)
    assert alone - without == pytest.approx(5 * (24 * tokens * 1024**2 + 4 * tokens**2 * 1024))
