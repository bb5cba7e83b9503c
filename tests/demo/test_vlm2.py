"""The demo of VLM^2 as a user runs it, with next to no training."""

import json

import numpy as np
import pytest

from vlmem_jax.cli.main import main
from vlmem_jax.demo import vlm2, vlm2_report
from vlmem_jax.demo.config import TRIAL
from vlmem_jax.demo.room_dataset import SHOWN, RoomsConfig
from vlmem_jax.demo.room_questions import TYPES
from vlmem_jax.demo.vlm2_report import Strip, accuracy, title
from vlmem_jax.runtime.sharding import make_mesh
from vlmem_jax.train.config import experiment

COMMAND = ["demo", "--memory", "vlm2", "--steps-scale", "0.001", "--workdir"]


def test_every_experiment_fits_eight_devices(tmp_path):
    recipe = vlm2.VLM2Recipe.scaled(0.01)
    for made in (
        vlm2.read_experiment(tmp_path, recipe),
        vlm2.short_experiment(tmp_path, recipe, tmp_path, None),
        vlm2.short_experiment(tmp_path, recipe, tmp_path, vlm2.PLACED),
        vlm2.long_experiment(tmp_path, recipe, tmp_path, vlm2.BOTH),
    ):
        made = experiment(made)
        made.check_mesh(make_mesh(made.mesh))
        assert made.seed == 0
    assert experiment(vlm2.read_experiment(tmp_path, vlm2.VLM2Recipe.scaled(0.01, seed=3))).seed == 3


def test_a_recipe_is_scaled_as_a_whole():
    half, trial = vlm2.VLM2Recipe.scaled(0.5), vlm2.VLM2Recipe.scaled(TRIAL / 2)
    assert half.steps == {name: round(count / 2) for name, count in vlm2.STEPS.items()}
    assert half.dataset.clips == RoomsConfig().clips // 2 and half.dataset.asked <= RoomsConfig().asked
    assert trial.dataset.lengths == {"dwell": (24,), "scan": (24,)}
    with pytest.raises(ValueError, match="--steps-scale must be positive"):
        vlm2.VLM2Recipe.scaled(0)


def test_types_are_weighed_by_their_questions():
    assert accuracy({"order": [3, 4], "count": [0, 2]}) == 0.5
    assert accuracy({}) is None
    assert title("asked/dwell_96") == "96 frames, dwelling"


def test_the_closing_words_are_the_numbers(tmp_path):
    def row(what, right, places):
        return {
            "what": what,
            "questions": {name: {"order": [right, 10], "direction": [places, 10]} for name in columns},
        }

    columns = ["asked/dwell_96", "asked/scan_96"]
    rows = {"space": row("even", 1, 0), "both": row("paper", 3, 1), "pair": row("ours", 6, 2)}
    rows |= {"oracle": row("all", 9, 9), "base_oracle": row("all, no places", 8, 2)}
    told = {"rows": rows, "columns": columns, "middle": columns[0], "shown": 8, "chance": {"direction": 0.25}}
    said = vlm2.closing_words({"vlm2": told, "seconds": {"total": 90}}, tmp_path)
    for words in (
        "96 frames, dwelling: frames spread evenly 5.0 %, kept by the paper's rule 20.0 %, by ours 40.0 %, and 90.0 %",
        "Directions, where every poster is shown: 90.0 % with places, 20.0 % without; chance 25.0 %",
        "96 frames, scanning: spread evenly 5.0 %, kept by the paper's rule 20.0 %, by ours 40.0 %",
        "1.5 minutes",
    ):
        assert words in said


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, one_device):
    """Each size of the memory is a program of its own: two of them do."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm2, "SWEPT", ((2, 4), (8,)))
        assert main([*COMMAND, str(folder), "--compare"]) == 0
        yield folder


@pytest.mark.slow
def test_every_number_is_in_the_summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    told = summary["vlm2"]
    assert list(told["rows"]) == [*vlm2.DEFAULT_ROWS, *vlm2.COMPARED_ROWS]
    for row in told["rows"].values():
        for column in told["columns"]:
            assert set(row["questions"][column]) <= set(TYPES)
            assert 0 <= accuracy(row["questions"][column]) <= 1 and 0 <= row["coverage"][column] <= 1
    for column in told["columns"]:
        coverage = {name: row["coverage"][column] for name, row in told["rows"].items()}
        assert coverage["oracle"] == 1 and coverage["base"] == coverage["space"] == coverage["working"]
    sizes = [(one["working"], one["episodic"]) for one in told["swept"]["pair"]]
    assert sizes == [(working, episodic) for working in vlm2.SWEPT[0] for episodic in vlm2.SWEPT[1]]
    assert summary["steps"]["total"] == sum(count for name, count in summary["steps"].items() if name != "total")


@pytest.mark.slow
def test_the_report_shows_the_frames_that_are_kept(workdir):
    page = (workdir / "report.html").read_text()
    for part in ("Right answers", "By type", "What is kept", "Sizes of the memory", "with places", "How it was made"):
        assert part in page
    assert page.count("<figure>") == SHOWN * len(vlm2.DEFAULT_ROWS | vlm2.COMPARED_ROWS)
    assert "://" not in page and "src=" not in page and "<link" not in page


@pytest.mark.slow
def test_a_second_call_trains_nothing_again_and_gives_the_same_numbers(workdir, capfd):
    before = json.loads((workdir / "summary.json").read_text())["vlm2"]["rows"]
    assert main([*COMMAND, str(workdir)]) == 0
    printed = capfd.readouterr().out
    assert "trains" not in printed and "Right answers" in printed and "24 frames, scanning: spread evenly" in printed
    again = json.loads((workdir / "summary.json").read_text())["vlm2"]["rows"]
    assert again == {name: before[name] for name in again}


def test_a_strip_holds_frames_and_their_times():
    strip = Strip("x", np.zeros((2, 32, 32, 3), np.uint8), [0, 5], 96)
    assert "What is kept" in vlm2_report._kept([strip]) and "<figcaption>6<" in vlm2_report._kept([strip])
