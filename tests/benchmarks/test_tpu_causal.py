"""What the cases of packed rows hold, and what is counted of them."""

import importlib.util
import json

import numpy as np
import pytest

from benchmarks import tpu_cached
from benchmarks.tpu_causal import CASES, CausalCase, rows, table, useful_share
from benchmarks.tpu_static import main


@pytest.mark.parametrize(
    "name, share", [("one", 1.0), ("four", 0.25), ("lognormal", 0.152), ("group", 0.40), ("heads64", 1.0)]
)
def test_cases_have_the_useful_share_that_they_are_named_for(name, share):
    case = CausalCase(name, "v5e", "forward")
    listed = rows(case)
    assert all(len(segments) == case.length for segments, _ in listed)
    assert np.mean([useful_share(*row) for row in listed]) == pytest.approx(share, abs=0.002)
    assert name in CASES


def test_rows_that_read_a_cache_have_the_useful_share_of_their_lengths():
    chunk = tpu_cached.CachedCase("chunk", "v5e")
    pairs = sum(length - 511 + token for length in chunk.lengths for token in range(512))
    assert tpu_cached.useful_share(chunk) == pytest.approx(pairs / (8 * 512 * 32768))
    assert chunk.lengths.min() == 4096 and chunk.lengths.max() == 32768 and (chunk.lengths % 128 > 0).sum() == 6


def test_useful_are_pairs_of_a_segment_and_of_its_prefix():
    segments = np.array([1, 1, 2, 2, 3])
    prefix = np.array([0, 0, 1, 1, 1])
    assert useful_share(segments, None) == (3 + 3 + 1) / 15
    assert useful_share(segments, prefix) == (3 + 3 + 1 + 3 * 2) / 15


def test_a_case_that_there_is_not_is_named():
    with pytest.raises(
        ValueError, match="--case must be some of one, four, lognormal, group, heads64, chunk, decode, got five"
    ):
        main(["--kernel", "causal_attention", "--case", "five"])


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_chunks_on_a_cache_cost_what_is_filled_of_it(tmp_path):
    named = ["--kernel", "causal_attention", "--chips", "v5e", "--directions", "forward", "backward"]
    main([*named, "--case", "chunk", "decode", "--json", str(tmp_path / "rows.json")])
    chunk, decode = json.loads((tmp_path / "rows.json").read_text())
    assert not chunk["kept_jax"] and chunk["ratio"] < 1.15 * chunk["useful_share"]
    assert chunk["cycles"] < 1.15 * chunk["useful_share"] * chunk["full_cycles"]
    assert not decode["kept_jax"] and decode["cycles"] < 0.5 * min(decode["einsum_cycles"], decode["filled_cycles"])


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.xdist_group("libtpu")
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_packs_cost_little_more_than_what_is_useful_in_them(tmp_path):
    named = ["--kernel", "causal_attention", "--chips", "v5e", "--directions", "forward"]
    main([*named, "--case", "four", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert not row["kept_jax"] and row["ratio"] < 1.2 * row["useful_share"]
    assert "| four | forward | 0.250 |" in table([row])
