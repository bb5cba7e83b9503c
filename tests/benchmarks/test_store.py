"""What memories on disk cost, at toy size: what it counts holds there, too; what it times is some time."""

import json

import pytest

from benchmarks import store
from benchmarks.tables import tables


@pytest.mark.parametrize("name", store.ITEMS)
def test_each_item_runs(name, tmp_path, capsys):
    if name == "index":
        pytest.importorskip("lancedb")
    store.main(["--toy", "--only", name, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row["median"] >= 0 for row in rows)
    assert all(row["holds"] for row in rows if row["unit"] == ""), "what few vectors are compared with is all there is"
    (table,) = tables(capsys.readouterr().out)
    assert table.columns == ["measured", "median", "range", "goal"] and len(table.rows) == len(rows)
