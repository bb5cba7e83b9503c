"""What is counted of the rotation alone."""

import importlib.util

import pytest

from benchmarks.tpu_rope import measure, table


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_kernel_turns_a_chunk_in_fewer_cycles_than_xla():
    row = measure("chunk", "v5e")
    assert 0 < row["cycles"] < row["xla_cycles"] and not row["kept_jax"]
    assert f"| v5e | chunk | {row['cycles']} |" in table([row])
