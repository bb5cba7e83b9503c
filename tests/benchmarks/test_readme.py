"""The READMEs' tables: found beside their commands, made again, compared, and put in place."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks import readme, tpu_static, tpu_tables
from benchmarks.tables import markdown, moved, tables
from benchmarks.tpu_dump import UNITS

ROOT = Path(readme.ROOT)
TEXT = """# Title

| function | what it does |
|---|---|
| `f` | a table that nothing makes |

By `python -m
benchmarks.toy exact`, counted:

| chip | slots | cycles |
|---|---|---|
| v5e | 256 | 1000 |
| v5e | 512 | 2000 |

Timed by `python -m benchmarks.toy timed`.

| measured | median | range | goal |
|---|---|---|---|
| a call | 2 ms | 1.5 to 2.5 | at most 3 ms |
| copies | 0 | | at most 0 |

The end.
"""


class Toy:
    """Stands for a benchmark module."""

    def __init__(self, cycles=2000, milliseconds=2.0, copies=0):
        self.cycles, self.milliseconds, self.copies = cycles, milliseconds, copies

    def main(self, arguments: list[str]) -> None:
        timed = [["a call", f"{self.milliseconds} ms", "1 to 9", "at most 3 ms"], ["copies", self.copies, "", ""]]
        made = {
            "exact": markdown(["chip", "slots", "cycles"], [["v5e", 256, 1000], ["v5e", 512, self.cycles]]),
            "timed": markdown(["measured", "median", "range", "goal"], timed),
        }
        print("measuring", made[arguments[0]], sep="\n")


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A README, and a way to make its tables again with other figures."""
    path = tmp_path / "README.md"
    path.write_text(TEXT)

    def again(toy: Toy, *flags: str) -> int:
        monkeypatch.setitem(sys.modules, "benchmarks.toy", toy)
        return readme.main(["--files", str(path), *flags])

    again.path = path
    return again


def test_tables_are_found_with_the_command_of_their_paragraph():
    nothing, exact, timed = tables(TEXT)
    assert nothing.module is None
    assert exact.command == "python -m benchmarks.toy exact" and timed.arguments == ("timed",)
    assert exact.columns == ["chip", "slots", "cycles"] and exact.rows[1] == ["v5e", "512", "2000"]
    assert TEXT.splitlines()[timed.start] == "| measured | median | range | goal |"


def test_within_its_range_a_median_has_not_moved(page, capsys):
    assert page(Toy(milliseconds=2.4)) == 0
    assert "0 of 2 rows moved" in capsys.readouterr().out


def test_what_moved_is_listed_and_the_exit_status_says_so(page, capsys):
    assert page(Toy(cycles=2001, milliseconds=2.6, copies=1)) == 1
    said = capsys.readouterr().out
    assert "v5e, 512: cycles 2000 -> 2001" in said and "v5e, 256" not in said
    assert "a call: median 2 ms -> 2.6 ms" in said and "copies: median 0 -> 1" in said
    assert page.path.read_text() == TEXT


def test_write_puts_new_figures_in_place(page):
    assert page(Toy(cycles=2001), "--write") == 0
    assert page.path.read_text() == TEXT.replace("2000", "2001")
    assert page(Toy(cycles=2001)) == 0


def test_only_some_tables_and_an_unknown_one(page, capsys):
    assert page(Toy(milliseconds=9), "--only", "exact") == 0
    with pytest.raises(SystemExit):
        page(Toy(), "--only", "exakt")
    assert "python -m benchmarks.toy timed" in capsys.readouterr().err


def test_rows_that_came_and_went_are_named():
    old, new = (tables(markdown(["chip", "cycles"], rows))[0] for rows in ([["v5e", 1], ["v4", 2]], [["v5e", 1]]))
    assert moved(old, new) == ["v4: is not made any more"] and moved(new, old) == ["v4: is new"]


@pytest.mark.parametrize("path", readme.FILES, ids=lambda path: path.parent.name)
def test_the_tables_of_kernels_have_the_rows_that_their_commands_make(path, monkeypatch):
    def measure(case):
        return tpu_static.Row(case, 1000, 1250.0, 1000.0, 7, dict.fromkeys(UNITS, 0.5), 2**21, None)

    monkeypatch.setattr(tpu_static, "measure", measure)
    found = [table for table in tables(path.read_text()) if table.module == tpu_tables.__name__]
    assert found
    for table in found:
        made, _ = readme.again(table)
        assert (made.columns, list(made.by_label())) == (table.columns, list(table.by_label())), table.command


@pytest.mark.parametrize("path", readme.FILES, ids=lambda path: path.parent.name)
def test_tables_of_figures_name_what_makes_them(path):
    text = path.read_text()
    lines = text.splitlines()
    for table in tables(text):
        if all(any(re.fullmatch(r"[\d.]+( ?[%x]| ms)?", cell) for cell in row) for row in table.rows):
            before = "\n".join(lines[: table.start]).rstrip().split("\n\n")[-1]
            assert re.search(r"`(python -m|bash launch/|vlmem) ?\w", before), lines[table.start]


@pytest.mark.parametrize("name", ["cpu", "kernels", "tpu_static", "tpu_tables", "readme"])
def test_each_runs_as_a_plain_script(name, monkeypatch, capsys):
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *(p for p in sys.path if Path(p).resolve() != ROOT)])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    for module in [module for module in sys.modules if module.partition(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="__main__")
    assert done.value.code == 0 and f"python -m benchmarks.{name}" in capsys.readouterr().out
