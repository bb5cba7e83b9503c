"""The kernels' timings, at sizes that any machine times at once."""

import json

import pytest

from benchmarks import kernels
from benchmarks.tpu_kernels import Case
from kernels_pallas.memory_attention.blocks import GPU, Gpu


def test_times_each_direction_and_writes_the_rows(tmp_path, capsys):
    rows = tmp_path / "rows.json"
    sizes = ["--queries", "8", "--slots", "16", "--heads", "2", "--head-dim", "16", "--repeat", "2", "--runs", "3"]
    kernels.main([*sizes, "--json", str(rows)])
    listed = json.loads(rows.read_text())
    assert {(row["direction"], row["implementation"]) for row in listed} >= {
        (direction, name) for direction in ("forward", "backward", "decode") for name in ("plain JAX", "jax.nn, XLA")
    }
    for row in listed:
        assert len(row["seconds"]) == 3 and 0 < min(row["seconds"]) <= row["median_seconds"] <= max(row["seconds"])
        assert row["flops_per_second"] * row["median_seconds"] == pytest.approx(
            2 * row["queries"] * 16 * 2 * 16 * {"forward": 2, "backward": 5, "decode": 2}[row["direction"]]
        )
    assert len(capsys.readouterr().out.splitlines()) == len(listed) + 2


def test_the_search_tries_blocks_and_restores_the_table(monkeypatch):
    seen = []

    def attend(q, k, v):
        seen.append(GPU["forward"][64])
        return q

    monkeypatch.setattr(kernels, "implementations", lambda case: {"memory_attention": attend})
    before, tried = GPU["forward"][64], [Gpu(32, 32, 4, 1), Gpu(64, 32, 4, 1)]
    case = Case(direction="forward", queries=128, slots=16, heads=1, kv_heads=1, head_dim=16)
    found = kernels.search(case, repeat=1, runs=3, tried=tried)
    assert set(seen) == set(tried) and GPU["forward"][64] == before
    assert found[0].median <= found[1].median


def test_the_search_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--search"])
    assert "the device is cpu" in capsys.readouterr().err
