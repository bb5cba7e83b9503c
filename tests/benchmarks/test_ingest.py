"""How fast videos are taken in, at toy size: what it times is some time."""

import json

import pytest

from benchmarks import ingest
from benchmarks.tables import tables

pytest.importorskip("av")


@pytest.mark.parametrize("name", ingest.ITEMS)
def test_each_item_runs(name, tmp_path, capsys):
    ingest.main(["--toy", "--only", name, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows and all(row["median"] > 0 for row in rows)
    (table,) = tables(capsys.readouterr().out)
    assert table.columns == ["measured", "median", "range", "goal"] and len(table.rows) == len(rows)
