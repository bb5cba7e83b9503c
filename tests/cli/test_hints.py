"""Commands that messages name: each is one that works."""

import ast
import gzip
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vlmem_jax
from vlmem_jax.cli.main import EXTRAS, main
from vlmem_jax.data.jsonl import JsonLines

ROOT = Path(vlmem_jax.__file__).parent
COMMAND = re.compile(
    r"`((?:vlmem|hf|git|gunzip|unzip|gcloud)\b[^`]*)`|(vlmem convert [^`]*NEW_FOLDER)|(pip install [^`]*)"
)
TURNS = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
NOT_HERE = {"git lfs pull", "gcloud auth application-default login"}
"""These belong to tools that one has who needs them."""


def texts(tree):
    """Texts of a module that are no docstrings, with {} for what is filled in."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (inside | bare):
            yield node.value


def hints():
    """Commands in texts of the package."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for text in texts(ast.parse(path.read_text())):
            found |= {next(filter(None, match.groups())).strip() for match in COMMAND.finditer(text)}
    return sorted(found)


def test_hints_are_found():
    assert {"vlmem data convert", "hf auth login", "git lfs pull", "gunzip {}"} <= set(hints())


@pytest.mark.parametrize("hint", [hint for hint in hints() if hint.startswith("vlmem")])
def test_the_commands_of_hints_have_the_options_they_name(hint, capsys):
    words = shlex.split(hint.replace("{}", "x"))[1:]
    command = [word for word in words[:2] if word.isalpha() and word.islower()]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in words if word.startswith("--") and not word.startswith("--config."))


@pytest.mark.parametrize("hint", [hint for hint in hints() if not hint.startswith("vlmem")])
def test_the_programs_of_hints_are_there(hint):
    if hint.startswith("pip install"):
        listed = (ROOT.parent / "setup.py").read_text()
        assert all(f'"{extra}": ' in listed for extra in EXTRAS.values())
    elif hint not in NOT_HERE:
        words = shlex.split(hint)[: 3 if hint.startswith("hf") else 1]
        program = Path(sys.executable).with_name(words[0])
        words[0] = str(program) if program.is_file() else words[0]
        assert subprocess.run([*words, "--help"], capture_output=True).returncode == 0


def hint_of(path):
    """The command that reading a data file tells."""
    with pytest.raises(ValueError) as raised:
        JsonLines(str(path))
    return re.search("`(.+)`", str(raised.value))[1]


@pytest.mark.parametrize("indent", [None, 2])
def test_the_hint_for_other_json_makes_lines_of_it(tmp_path, indent):
    (tmp_path / "a b.json").write_text(json.dumps([{"conversations": TURNS}] * 3, indent=indent))
    assert main(shlex.split(hint_of(tmp_path / "a b.json"))[1:]) == 0
    assert len(JsonLines(str(tmp_path / "a b_lines.jsonl"))) == 3


def test_the_hints_for_packed_files_unpack_them(tmp_path):
    lines = json.dumps({"conversations": TURNS}) + "\n"
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    subprocess.run(shlex.split(hint_of(tmp_path / "train.jsonl.gz")), check=True)
    assert len(JsonLines(str(tmp_path / "train.jsonl"))) == 1
    if shutil.which("unzip"):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr("inside.jsonl", lines)
        (tmp_path / "train.zip").write_bytes(packed.getvalue())
        subprocess.run(shlex.split(hint_of(tmp_path / "train.zip")), check=True, cwd=tmp_path)
        assert len(JsonLines(str(tmp_path / "inside.jsonl"))) == 1
