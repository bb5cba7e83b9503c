"""Makes the tables of the READMEs again and says which figures moved by more than their spread.

    python -m benchmarks.readme                          # all that a command of the benchmarks makes; an hour or two
    python -m benchmarks.readme --only "tpu_tables v5e"  # those whose command contains the words
    python -m benchmarks.readme --only cpu --write       # and put them in place, where a figure moved

A table belongs to the command in the paragraph before it. A median has moved when it left the range beside it; any
other figure (the TPU compiler's are repeatable) when it is not equal. Exits with 1 when one moved and --write is not
given. While times are measured (benchmarks.cpu) nothing else should be running.
"""

import argparse
import contextlib
import importlib
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/readme.py`

from benchmarks.tables import Table, moved, tables

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", ROOT / "kernels_pallas" / "README.md")


def again(table: Table) -> tuple[Table, str]:
    """The table made anew, and its text."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        importlib.import_module(table.module).main(list(table.arguments))
    (made,) = tables(printed.getvalue())
    return made, "\n".join(printed.getvalue().splitlines()[made.start : made.end])


def put(path: Path, table: Table, text: str) -> None:
    """Writes a table in the place of the one with the same command."""
    lines = path.read_text().splitlines()
    old = next(t for t in tables(path.read_text()) if t.command == table.command)
    path.write_text("\n".join([*lines[: old.start], text, *lines[old.end :]]) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Says on stdout what moved, and on stderr what is going on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORDS", default=[""], help="part of a command; see --list")
    parser.add_argument("--write", action="store_true", help="put tables in which a figure moved into the READMEs")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--files", nargs="+", type=Path, default=FILES, metavar="FILE", help="other READMEs")
    args = parser.parse_args(arguments)
    every = [(path, table) for path in args.files for table in tables(path.read_text()) if table.module]
    for words in args.only:
        if not any(words in table.command for _, table in every):
            commands = "\n  ".join(table.command for _, table in every)
            parser.error(f"--only {words!r} is part of no command; these are\n  {commands}")
    chosen = [(path, table) for path, table in every if any(words in table.command for words in args.only)]
    if args.list:
        print("\n".join(table.command for _, table in chosen))
        return 0
    failed = False
    for number, (path, table) in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {table.command}", file=sys.stderr, flush=True)
        start = time.monotonic()
        try:
            made, text = again(table)
        except (RuntimeError, ValueError) as error:  # a kernel that does not compile; the others may
            print(f"{table.command}: {error}", flush=True)
            failed = True
            continue
        changes = moved(table, made)
        print(f"{table.command}: {len(changes)} of {len(table.rows)} rows moved", *changes, sep="\n  ", flush=True)
        print(f"took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if changes and args.write:
            put(path, table, text)
        failed |= bool(changes) and not args.write
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
