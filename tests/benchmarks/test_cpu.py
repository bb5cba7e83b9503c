"""Every comparison on a CPU at toy size: what it counts holds there, too; what it times is some time."""

import json

import pytest

from benchmarks import cpu
from benchmarks.tables import tables

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.parametrize("name", cpu.ITEMS)
def test_each_item_runs_and_what_it_counts_holds(name, tmp_path, capsys):
    cpu.main(["--toy", "--only", name, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(min(row["values"]) >= 0 for row in rows)
    for row in rows:
        assert row["holds"] if row["goal"] == 0 else row["median"] > 0, row
    (table,) = tables(capsys.readouterr().out)
    assert table.columns == ["measured", "median", "range", "goal"] and len(table.rows) == len(rows)
