"""The models that the benchmarks run on a CPU."""

import jax

from vlmem_jax import families
from vlmem_jax.models import VLM
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings


def deep(layers: int) -> dict:
    """Many layers of tiny width: all that is left to measure is what does not depend on width."""
    return {"preset": "tiny", "decoder": {"layers": layers}, "memory": {"kind": "comemo", "every": 4}}


def wide(layers: int, width: int = 256, **changes) -> dict:
    """A model whose time goes into matrix products."""
    heads, mlp_width = width // 64, 4 * width
    decoder = dict(layers=layers, width=width, heads=heads, kv_heads=heads // 2, head_dim=64, mlp_width=mlp_width)
    comemo = dict(kind="comemo", every=4, heads=heads, head_dim=64, mlp_width=mlp_width)
    return {"preset": "tiny", "decoder": decoder, "memory": comemo, **changes}


def make(config: dict) -> tuple[VLM, dict]:
    """A model and its parameters, sharded as the command line would have them."""
    vlm = VLM(families.resolve(config))
    shardings = param_shardings(make_mesh(MeshConfig()), vlm.abstract(), vlm.axes())
    return vlm, jax.jit(vlm.init, out_shardings=shardings)(jax.random.key(0))
