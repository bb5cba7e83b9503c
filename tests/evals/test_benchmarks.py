"""What benchmarks are reported by, from answers whose scores are known, and how a model is shown videos for them."""

import pytest

from tests.evals import world
from vlmem_jax.config import ConfigError
from vlmem_jax.evals.benchmarks import GENERATED, Tally, length_class, mean_of_groups, reported, tallied
from vlmem_jax.evals.summary import summarise, table
from vlmem_jax.generate import load_model


def line(source, score, length=0.0, frames=8, **more):
    cost = {"seconds": 1.0, "compiled": False, "peak_memory_gb": 1.0, "tokens": 2, "stopped": True}
    return {"source": source, "output": "a", "score": score, "frames": frames, "length": length} | cost | more


VSI = [
    line("object_counting", 1.0, 30.0),
    line("object_counting", 0.6, 90.0),
    line("object_rel_direction_easy", 1.0, 30.0),
    line("object_rel_direction_easy", 0.0, 150.0),
    line("object_rel_direction_hard", 1.0, 60.0),
    line("route_planning", 0.0, 120.0),
    line("route_planning", None, 30.0),
]


def test_vsi_bench_merges_directions():
    assert reported("vsibench", VSI) == {
        "object_counting": 0.8, "object_rel_direction": 0.75, "route_planning": 0.0, "overall": pytest.approx(1.55 / 3),
        "numerical": 0.8, "multiple_choice": 0.375, "unmerged": pytest.approx((0.8 + 0.5 + 1.0 + 0.0) / 4),
    }  # fmt: skip


def test_vsti_bench_is_reported_both_ways():
    kinds = {
        "camera_displacement": 0.5, "camera_movement_direction": 1.0, "obj_obj_relative_pos_nf": 1.0,
        "obj_obj_relative_pos_ud": 0.0, "obj_obj_relative_pos_lr": 0.5, "camera_obj_rel_dist_v1": 1.0,
        "camera_obj_rel_dist_v3": 0.0,
    }  # fmt: skip
    found = reported("vstibench", [line(kind, score) for kind, score in kinds.items()])
    assert (found["obj_obj_relative_pos"], found["camera_obj_rel_dist"]) == (0.5, 0.5)
    assert found["overall"] == (0.5 + 1.0 + 0.5 + 0.5) / 4 and found["unmerged"] == pytest.approx(4.0 / 7)
    assert found["numerical"] == 0.5 and found["multiple_choice"] == pytest.approx(2.0 / 3)


def test_exact_match_is_a_mean_over_questions():
    lines = [line("what", 1.0), line("what", 0.0), line("is", 1.0), line("is", None)]
    assert reported("sqa3d", lines) == {"exact match": 2 / 3} and reported("sqa3d", lines[3:]) == {}


def test_what_failed_counts_as_wrong_and_groups_count_alike():
    lines = [line("needle", 1.0), line("needle", 1.0), line("needle", None), line("summary", 0.0)]
    lines += [{"source": "order", "error": "damaged"}, line("order", 1.0, stage="L2")]
    assert tallied(lines) == {"": Tally(3.0, 6)}
    tasks = tallied(lines, "source")
    assert tasks == {"needle": Tally(2.0, 3), "summary": Tally(0.0, 1), "order": Tally(1.0, 2)}
    assert mean_of_groups(tasks, GENERATED) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean_of_groups(tasks) == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert tallied(lines, "stage") == {"": Tally(2.0, 5), "L2": Tally(1.0, 1)} and mean_of_groups({}) == 0.0


@pytest.mark.parametrize(
    ("seconds", "name"),
    [(59.9, "under 1 min"), (60, "1 to 2 min"), (120, "1 to 2 min"), (120.1, "over 2 min")],
)
def test_classes_of_length(seconds, name):
    assert length_class(seconds) == name


def test_each_class_has_its_own_numbers():
    found = summarise(VSI, benchmark="vsibench")
    classes = {name: (of["samples"], of["benchmark"]["overall"]) for name, of in found["lengths"].items()}
    assert classes == {"under 1 min": (3, 1.0), "1 to 2 min": (3, (0.6 + 1.0 + 0.0) / 3), "over 2 min": (1, 0.0)}
    assert (found["mode"], found["frames"]) == ("offline", [8, 8])
    assert "lengths" not in summarise([{k: v for k, v in VSI[0].items() if k not in ("frames", "length")}])
    assert summarise([line("a", 1.0, frames=3), line("a", 1.0)])["lengths"] == {}


def test_numbers_stand_beside_what_they_depend_on():
    about = {"version": "0.1.0 (abc)", "parameters": "0123456789"}
    rows = table(about | summarise([*VSI, line("object_counting", 1.0, 30.0, frames=5)], benchmark="vsibench"))
    lines = rows.partition("\n\n")[2].splitlines()
    assert [row.split() for row in lines[:2]] == [
        ["benchmark", "all", "under", "1", "min", "1", "to", "2", "min", "over", "2", "min"],
        ["object_counting", "86.7", "%", "100.0", "%", "60.0", "%", "-"],
    ]
    assert lines[-2].split() == ["samples", "8", "4", "3", "1"]
    assert lines[-1] == "5 to 8 frames a question, offline, vlmem_jax 0.1.0 (abc), parameters 01234567"
    plain = table(summarise([line("zoo", 1.0, 30.0)])).splitlines()
    assert plain[-3].split() == ["accuracy", "100.0", "%", "100.0", "%"] and plain[-1].startswith("8 frames a question")


def test_a_model_is_shown_videos_otherwise_than_trained(tmp_path):
    model = load_model(world.frames_checkpoint(tmp_path))

    def asked(of):
        video, chosen = of.processor.open_video(tmp_path / "a.mp4")
        sample = of.processor.prompt("What?", videos=[video])
        return chosen, of.processor.tokenizer.decode(sample.tokens_T).replace("\n", "|")

    chosen, text = asked(model)
    assert chosen == [0, 3, 6, 9] and "|The video lasts for 1.00 seconds, and 4 frames" in text
    chosen, text = asked(model.showing({"frames": 2, "time_line": False}))
    assert chosen == [0, 9] and "|What?|" in text and "The video lasts" not in text
    assert asked(model)[0] == [0, 3, 6, 9]
    with pytest.raises(ConfigError, match="unknown key --image.frame; did you mean --image.frames"):
        model.showing({"frame": 2}, "--image")
