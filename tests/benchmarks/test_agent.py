"""What a memory costs to build, at toy size: what it counts holds there, too; what it times is some time."""

import json

import pytest

from benchmarks import agent
from benchmarks.tables import tables

pytestmark = pytest.mark.usefixtures("one_device")
COUNTED = (
    "how often the tower sees a frame",
    "calls of the model in a build that was finished",
    "compilations in 2 videos and questions, after warm-up",
    "largest call of a long video, frames / its budget",
)


def test_each_item_runs_and_what_it_counts_holds(tmp_path, capsys):
    agent.main(["--toy", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row["median"] >= 0 for row in rows)
    assert {row["what"]: row["holds"] for row in rows if row["what"] in COUNTED} == dict.fromkeys(COUNTED, True)
    (table,) = tables(capsys.readouterr().out)
    assert table.columns == ["measured", "median", "range", "goal"] and len(table.rows) == len(rows)
