"""The demo of VisMem: pieces of its report, and the command as a user runs it, with next to no training."""

import json

import numpy as np
import pytest
from PIL import Image

from vlmem_jax.cli.main import main
from vlmem_jax.demo import vismem
from vlmem_jax.demo.vismem_report import EXAMPLES, examples, marked

COMMAND = ["demo", "--memory", "vismem", "--steps-scale", "0.005", "--workdir"]


def test_memories_are_shown_where_they_were_called_for():
    # chosen tokens: 3 ; <call> 4 makes 7 . <call> Answer: 7
    parts = marked("3 ; 4 makes 7 . Answer: 7", [("short", 2), ("long", 7)])
    assert parts == [("3 ;", ""), ("", "short"), ("4 makes 7 .", ""), ("", "long"), ("Answer: 7", "")]
    assert marked("3 ;", []) == [("3 ;", "")]
    assert marked("", [("long", 0)]) == [("", "long")]


def test_examples_are_those_with_most_memories_and_some_wrong_ones(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "x.png")
    asked = [{"prompt": ["image 1: ", {"image": "x.png"}, "\n", f"What {n}?"], "answer": "7"} for n in range(20)]
    answers = [
        {"id": str(n), "output": "7", "score": float(n % 4 > 0), "memories": [["short", 0]] * (n % 5)}
        for n in range(20)
    ]
    chosen = examples(tmp_path, asked, answers)
    assert len(chosen) == EXAMPLES and [one.right for one in chosen] == [True] * 5 + [False] * 3
    assert [len(one.memories) for one in chosen] == [4, 4, 4, 3, 3, 4, 3, 2]
    assert chosen[0].question == "What 9?"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    """Answers are cut short: after so few steps they say nothing, however long they are."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vismem, "ANSWER_TOKENS", 8)
        assert main([*COMMAND, str(folder), "--compare"]) == 0
        yield folder


@pytest.fixture(scope="module")
def summary(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
def test_every_number_is_in_the_summary(summary):
    vismem = summary["vismem"]
    rows = ["sft", "warmup", "formation", "invocation", "off", "always", "random_50", "random_75", "short_only"]
    budget = ["budget_base", "budget_plain", "budget_off", "budget_first", "budget_learned"]
    assert list(vismem["accuracy"]) == [*rows, "long_only", "reversed", *budget]
    assert all(0 <= accuracy <= 1 for accuracy in vismem["accuracy"].values())
    assert vismem["accuracy"]["off"] == vismem["accuracy"]["sft"]  # VisMem leaves the base as it is
    for name, score in vismem["scores"].items():
        assert score["scored"] == summary["dataset"]["heldout"]
        called = score.get("invocation", {"per_sample": 0})["per_sample"]
        assert called == 0 or name not in ("sft", "off", "budget_off")
    assert vismem["accuracy"]["budget_off"] == vismem["accuracy"]["budget_plain"]
    assert vismem["scores"]["budget_first"]["invocation"]["per_sample"] == 1
    assert vismem["scores"]["short_only"]["invocation"]["ratio"]["long"] == 0
    assert vismem["scores"]["long_only"]["invocation"]["ratio"]["short"] == 0
    steps = [line["step"] for line in vismem["rewards"]]
    assert steps == sorted(steps) and len(steps) == summary["steps"]["formation"] + summary["steps"]["invocation"]
    assert all({"score/mean", "score/base", "memory/per_answer"} <= line.keys() for line in vismem["rewards"])
    assert max(line["memory/per_answer"] for line in vismem["rewards"]) > 0
    assert vismem["parameters"]["vismem"] == vismem["parameters"]["vismem/formation"] > vismem["parameters"]["base"]


@pytest.mark.slow
def test_the_report_needs_no_other_file(workdir):
    page = (workdir / "report.html").read_text()
    for part in ("Accuracy on held-out", "Reinforcement", "Where invocations fall", "Answers after", "How it was made"):
        assert part in page
    assert "://" not in page and "src=" not in page and "<link" not in page


@pytest.mark.slow
def test_a_second_call_trains_nothing_again_and_gives_the_same_numbers(workdir, summary, capfd):
    assert main([*COMMAND, str(workdir)]) == 0
    printed = capfd.readouterr().out
    assert printed.count("is done") == 5 and "trains" not in printed
    again = json.loads((workdir / "summary.json").read_text())["vismem"]["accuracy"]
    assert again == {name: summary["vismem"]["accuracy"][name] for name in again}


def test_the_folder_of_another_demo_is_refused(tmp_path, capsys):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.json").write_text("{}")
    assert main(["demo", "--memory", "vismem", "--workdir", str(tmp_path), "--steps-scale", "0.5"]) == 2
    assert "or --memory" in capsys.readouterr().err
