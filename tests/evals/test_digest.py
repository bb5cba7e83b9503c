"""A digest tells parameters that differ anywhere, and does not depend on where they lie."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmem_jax.evals import digest as module
from vlmem_jax.evals.digest import digest
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh

SHAPE = (2, 512, 128)
"""More values than an earlier fingerprint looked at: 65,536."""


def values(dtype=np.float32):
    """Parameters as numpy arrays."""
    rng = np.random.default_rng(0)
    return {"table": rng.normal(size=SHAPE).astype(dtype), "gate": np.float32([0.5]), "scale": np.float32(2.0)}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_one_value_that_differs_changes_it(dtype):
    params = values(dtype)
    before = digest(params)
    assert digest(params) == before
    params["table"][1, 511, 127] = np.nextafter(params["table"][1, 511, 127], dtype(9.0))
    assert digest(params) != before


def test_swapped_values_rows_and_arrays_change_it():
    params, found = values(), set()
    found.add(digest(params))
    table = params["table"]
    table[1, 3, 5], table[1, 3, 6] = table[1, 3, 6], table[1, 3, 5]
    found.add(digest(params))
    table[:, [7, 8]] = table[:, [8, 7]]
    found.add(digest(params))
    found.add(digest({**params, "table": table[::-1]}))
    found.add(digest({**params, "gate": np.float32([2.0]), "scale": np.float32(0.5)}))
    found.add(digest({"other": params["table"], "gate": params["gate"], "scale": params["scale"]}))
    assert len(found) == 6


def test_shape_and_dtype_belong_to_it():
    zeros = [jnp.zeros(shape, dtype) for shape in ((4, 2), (2, 4), (8,)) for dtype in (jnp.float32, jnp.bfloat16)]
    assert len({digest({"x": x}) for x in zeros}) == 6


@pytest.mark.parametrize("spec", [(None, "fsdp", "tensor"), ("tensor", None, "fsdp"), (None, ("fsdp", "tensor"))])
def test_it_is_the_same_wherever_the_values_lie_and_gathers_none(spec):
    mesh, params = make_mesh(MeshConfig(fsdp=4, tensor=2)), values()
    spread = {**params, "table": jax.device_put(params["table"], NamedSharding(mesh, PartitionSpec(*spec)))}
    assert digest(spread) == digest(params)
    text = module._sums.lower([spread["table"]]).compile().as_text()
    sizes = re.findall(r"= \(?\w+\[([\d,]*)\].* (?:all-|collective-)[\w-]+\(", text)
    assert sizes and all(math.prod(map(int, filter(None, size.split(",")))) <= 8 for size in sizes), "sums alone"
