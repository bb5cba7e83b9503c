"""The kernels lower for a GPU that is not there, and keep no scores in HBM."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import causal_attention, memory_attention, rope_dhr, rotary_tables

H200 = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice("NVIDIA H200", 132, "cuda"))
CALL = "__gpu$xla.gpu.triton"
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.11


def lowered(function, *shapes) -> str:
    with jax.sharding.use_abstract_mesh(H200):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def sizes(module: str) -> list[int]:
    """Entries of each array in the module."""
    return [math.prod(map(int, found.split("x"))) for found in re.findall(r"tensor<((?:\d+x)*\d+)x\w+>", module)]


CASES = {  # queries, slots, query heads, kv heads, head dim, type, segments and limit, keys turned already
    "dense": (2048, 4096, 2, 2, 128, jnp.bfloat16, False, False),
    "packed": (1000, 3000, 7, 1, 80, jnp.bfloat16, True, False),
    "fp32": (300, 2000, 2, 1, 64, jnp.float32, True, False),
    "decode": (1, 3000, 8, 2, 128, jnp.bfloat16, False, True),
    "decode 16": (16, 3000, 8, 2, 64, jnp.bfloat16, True, True),
    "wide": (4096, 8192, 1, 1, 256, jnp.bfloat16, False, False),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_attention_lowers_without_an_array_of_scores(case):
    queries, slots, heads, kv_heads, width, dtype, masked, turned = CASES[case]
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, queries, heads, width), dtype), shape((1, slots, kv_heads, width), dtype)
    lengths = {"q_pos": queries} | ({} if turned else {"k_pos": slots})
    lengths |= {"q_segments": queries, "k_segments": slots, "limit": queries} if masked else {}
    rest = {name: shape((1, length), jnp.int32) for name, length in lengths.items()}

    def forward(q, k, v, rest):
        return memory_attention(q, k, v, **rest, k_rotated=turned, return_lse=True)

    def backward(q, k, v, rest):
        def loss(q, k, v):
            o, lse = forward(q, k, v, rest)
            return jnp.sum(o.astype(jnp.float32)) + jnp.sum(lse)

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for function, kernels in ((forward, 1), (backward, 3)):
        module = lowered(function, q, k, k, rest)
        assert module.count(CALL) == kernels
        if not turned:
            assert max(sizes(module)) < queries * slots


@pytest.mark.parametrize("length, heads, width", [(2048, (14, 2), 128), (1000, (4, 4), 64)])
def test_causal_attention_lowers_without_an_array_of_scores_or_more_heads(length, heads, width):
    shape = jax.ShapeDtypeStruct
    q, k = (shape((1, length, n, width), jnp.bfloat16) for n in heads)
    ids = shape((1, length), jnp.int32)

    def loss(q, k, v, positions, segments, prefix):
        o = causal_attention(q, k, v, positions=positions, segments=segments, prefix=prefix)
        return o.astype(jnp.float32).sum()

    module = lowered(jax.grad(loss, (0, 1, 2)), q, k, k, ids, ids, ids)
    assert module.count(CALL) == 3
    assert max(sizes(module)) <= max(math.prod(q.shape), length * heads[0])


@pytest.mark.parametrize("tables", [False, True])
def test_rope_dhr_lowers_in_one_call_each_way(tables):
    x, positions = jax.ShapeDtypeStruct((2, 300, 5, 80), jnp.bfloat16), jax.ShapeDtypeStruct((2, 300), jnp.int32)

    def there_and_back(x, positions):
        y, back = jax.vjp(lambda x: rope_dhr(x, rotary_tables(positions, 1e6, 80) if tables else positions), x)
        return back(y)

    assert lowered(there_and_back, x, positions).count(CALL) == 2
