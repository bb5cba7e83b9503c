"""Numbers of captions: what pycocoevalcap is given and what is taken of it, and what is said where it is not there."""

import shutil
import sys
import textwrap

import pytest

from vlmem_jax.evals.captions import NAMES, captions
from vlmem_jax.evals.summary import summarise, table

LINES = [
    {"output": "On the left side.", "answers": ["left side", "on the left side"]},
    {"output": "2", "answers": ["two chairs"]},
    {"output": "unasked", "answers": []},
]
TOKENIZER = """
    class PTBTokenizer:
        def tokenize(self, captions):
            return {key: [one["caption"].replace(",", "") for one in of] for key, of in captions.items()}
    """
SCORER = """
    class {name}:
        def __init__(self, *of):
            print("{name} starts")

        def compute_score(self, references, outputs):
            assert references == {{0: ["left side", "on left side"], 1: ["two chairs"]}}, references
            assert outputs == {{0: ["on left side"], 1: ["two"]}}, outputs
            return {value}, "of each"
    """


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in of pycocoevalcap with this METEOR, and a java that nothing runs."""

    def make(meteor="0.3"):
        values = {"bleu": "[0.9, 0.8, 0.7, 0.6]", "cider": "1.5", "rouge": "0.4", "meteor": meteor}
        modules = {f"{kind}/{kind}.py": SCORER.format(name=kind.title(), value=value) for kind, value in values.items()}
        for name, text in {**modules, "tokenizer/ptbtokenizer.py": TOKENIZER}.items():
            file = tmp_path / "pycocoevalcap" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        (tmp_path / "java").write_text("#!/bin/sh\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
            monkeypatch.delitem(sys.modules, name)
        return tmp_path

    yield make
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]


def test_cleaned_answers_are_compared_with_all_references(package, capsys):
    package()
    assert captions(LINES) == ({"CIDEr": 1.5, "BLEU-4": 0.6, "METEOR": 0.3, "ROUGE-L": 0.4}, "")
    assert not capsys.readouterr().out


def test_a_failure_leaves_the_numbers_out_and_says_why(package):
    package(meteor="float('')")
    found, reason = captions(LINES)
    assert found == {} and reason.startswith(
        "CIDEr, BLEU-4, METEOR, ROUGE-L are left out: pycocoevalcap failed with Val"
    )


def test_what_is_missing_is_said(package, monkeypatch):
    folder = package()
    (folder / "java").unlink()
    assert "Java programs; put a `java` of 8 or newer on PATH" in captions(LINES)[1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert captions(LINES)[1].endswith("install it with: pip install 'vlmem_jax[captions]'")
    assert captions(LINES[2:]) == ({}, "")
    assert table(summarise([]) | {"left_out": captions(LINES)[1]}).splitlines()[-1].startswith("CIDEr, BLEU-4")


@pytest.mark.skipif(shutil.which("java") is None, reason="the tokeniser is a Java program")
def test_the_references_themselves_have_the_highest_scores():
    pytest.importorskip("pycocoevalcap")
    texts = "the small brown table under one window", "green curtains hang beside two old doors"
    found, reason = captions([{"output": text, "answers": [text]} for text in texts])
    assert not reason and list(found) == list(NAMES)
    assert [found[name] for name in NAMES] == pytest.approx([10.0, 1.0, 1.0, 1.0], abs=1e-3)
