"""The command as a user runs it, with next to no training."""

import json

import pytest

from vlmem_jax.cli.main import main
from vlmem_jax.demo import compare


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    """A demo with --compare that trains at two budgets and from no other start; `test_config` looks at all."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "OTHER_STARTS", {})
        patch.setattr(compare, "TRAINED", ("thumbnail", "pooled:2"))
        assert main(["demo", "--workdir", str(folder), "--steps-scale", "0.001", "--compare"]) == 0
    return folder


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
def test_every_number_is_in_the_summary(summary):
    accuracy = summary["comemo"]["accuracy"]
    assert 0 <= accuracy["single_image"] <= 1 and 0 <= accuracy["multi_image"] <= 1
    assert set(accuracy["by_position"]) == {"first", "middle", "last"}
    assert set(accuracy["by_grid"]) == {"1x1", "2x1", "1x2", "2x2"}
    assert set(accuracy["by_images"]) == {"1", "2", "3", "4"}
    assert set(summary["comemo"]["gates"]) == {"gate/attn/1", "gate/attn/3", "gate/mlp/1", "gate/mlp/3"}
    assert summary["chance"] == 0.1
    assert summary["seconds"]["total"] > 0
    assert summary["steps"]["total"] == sum(count for name, count in summary["steps"].items() if name != "total")


@pytest.mark.slow
def test_what_the_memory_adds_is_said_with_what_it_costs(summary):
    base, cut, comemo = (summary[name] for name in ("base", "base_at_budget", "comemo"))
    assert [one["context"] for one in (base, cut, comemo)] == ["all", "thumbnail", "thumbnail"]
    assert cut["cost"]["tokens"] == comemo["cost"]["tokens"] == 9 < base["cost"]["tokens"] == 27
    assert cut["cost"]["kv_bytes"] < comemo["cost"]["kv_bytes"]
    assert cut["cost"]["flops"] < comemo["cost"]["flops"] and cut["cost"]["flops"] < base["cost"]["flops"]
    assert cut["parameters"] == base["parameters"] < comemo["parameters"]


@pytest.mark.slow
def test_the_comparison_spends_equal_steps(summary):
    rows = summary["compare"]
    trained = [name for name in rows if name.startswith(("plain", "comemo"))]
    assert {rows[name]["steps"] for name in trained} == {summary["steps"]["finetune"]} and len(trained) > 3
    assert rows["gates_zero"]["gates"] == dict.fromkeys(rows["comemo"]["gates"], 0.0)
    assert rows["plain_thumbnail"]["gates"] == {}
    assert rows["memory_of_thumbnails"]["cost"]["kv_bytes"] < rows["comemo"]["cost"]["kv_bytes"]
    assert rows["comemo_pooled"]["cost"]["tokens"] == rows["plain_pooled"]["cost"]["tokens"] == 12


@pytest.mark.slow
def test_the_report_needs_no_other_file(workdir):
    page = (workdir / "report.html").read_text()
    for part in ("Questions and answers", "Accuracy", "Training", "Where it looks", "Comparison", "How it was made"):
        assert part in page
    assert "://" not in page and "src=" not in page and "<link" not in page


@pytest.mark.slow
def test_a_second_call_trains_nothing_again(workdir, capfd):
    assert main(["demo", "--workdir", str(workdir), "--steps-scale", "0.001"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("is done") == 3 and "trains" not in printed


def test_another_size_is_refused_in_the_same_folder(tmp_path, capsys):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.json").write_text("{}")
    assert main(["demo", "--workdir", str(tmp_path), "--steps-scale", "0.5"]) == 2
    assert "another --steps-scale" in capsys.readouterr().err


def test_a_scale_must_be_positive(tmp_path, capsys):
    assert main(["demo", "--workdir", str(tmp_path), "--steps-scale", "0"]) == 2
    assert "--steps-scale must be positive" in capsys.readouterr().err
