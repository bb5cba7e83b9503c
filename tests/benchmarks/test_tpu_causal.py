"""What the cases of packed rows hold, and what is counted of them."""

import importlib.util
import json

import numpy as np
import pytest

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


def test_useful_are_pairs_of_a_segment_and_of_its_prefix():
    segments = np.array([1, 1, 2, 2, 3])
    prefix = np.array([0, 0, 1, 1, 1])
    assert useful_share(segments, None) == (3 + 3 + 1) / 15
    assert useful_share(segments, prefix) == (3 + 3 + 1 + 3 * 2) / 15


def test_a_case_that_there_is_not_is_named():
    with pytest.raises(ValueError, match="--case must be some of one, four, lognormal, group, heads64, got five"):
        main(["--kernel", "causal_attention", "--case", "five"])


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
