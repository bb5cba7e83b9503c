"""VLM-3R's list of training data becomes lines: as much of each file as it says, each a question about a video."""

import json

import pytest

from vlmem_jax.cli.main import main
from vlmem_jax.data.convert import convert
from vlmem_jax.data.jsonl import JsonLines
from vlmem_jax.data.vlm3r import VLM3R
from vlmem_jax.processing import chat


def record(number, **changes):
    """A record as it is released: a question about a scene, and its answer."""
    turns = [{"from": "human", "value": f"<image>\nThese are frames of a video.\nHow many, {number}?"}]
    return {
        "id": number, "data_source": "scannet", "scene_name": "scene0000_00", "question_type": "object_counting",
        "video": "scannet/videos/scene0000_00.mp4", "conversations": [*turns, {"from": "gpt", "value": "4"}],
    } | changes  # fmt: skip


@pytest.fixture
def listed(tmp_path):
    """The YAML file of these datasets, beside data/ten.json of ten records and data/three.json of three."""
    (tmp_path / "data").mkdir()
    for name, numbers in ("ten", range(10)), ("three", range(20, 23)):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps([record(n) for n in numbers]))

    def make(*datasets, text=None):
        rows = (
            f"  - {{json_path: data/{name}.json, sampling_strategy: '{strategy}'}}\n" for name, strategy in datasets
        )
        (tmp_path / "list.yaml").write_text("datasets:\n" + "".join(rows) if text is None else text)
        return tmp_path / "list.yaml"

    return make


def ids(path):
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def test_a_record_becomes_a_line_that_training_reads(listed, tmp_path):
    assert convert(listed(("three", "all")), tmp_path / "out.jsonl", origin=VLM3R()) == (3, 0, [])
    lines = JsonLines(str(tmp_path / "out.jsonl"))
    assert json.loads(lines.text(0)) == {
        "id": 20, "source": "object_counting", "dataset": "scannet", "video": "scannet/videos/scene0000_00.mp4",
        "conversations": [
            {"from": "human", "value": "<video>\nThese are frames of a video.\nHow many, 20?"},
            {"from": "gpt", "value": "4"},
        ],
    }  # fmt: skip
    assert lines[0].video == "scannet/videos/scene0000_00.mp4" and lines[0].ignored == ()
    said = chat.read_conversation(lines[0].conversations, videos=["the video"])
    assert said.messages[0] == ("", "the video", "\nThese are frames of a video.\nHow many, 20?")


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("all", list(range(10))),
        ("first:3", [0, 1, 2]),
        ("end:2", [8, 9]),
        ("first:99", list(range(10))),
        ("first:21%", [0, 1, 2]),
        ("end:20%", [8, 9]),
        ("first:1%", [0]),
        ("random:100%", list(range(10))),
    ],
)
def test_as_much_is_taken_as_the_strategy_says(listed, tmp_path, strategy, wanted):
    origin = VLM3R()
    convert(listed(("ten", strategy), ("three", "end:1")), tmp_path / "out.jsonl", origin=origin)
    assert ids(tmp_path / "out.jsonl") == [*wanted, 22]
    assert origin.taken == [
        f"data/ten.json: {len(wanted)} of 10 records ({strategy})", "data/three.json: 1 of 3 records (end:1)",
    ]  # fmt: skip


def test_what_random_takes_depends_on_the_seed_alone(listed, tmp_path):
    drawn = []
    for n, seed in enumerate([0, 0, 1, 2]):
        convert(listed(("ten", "random:4"), ("ten", "random:41%")), tmp_path / f"{n}.jsonl", origin=VLM3R(seed=seed))
        found = ids(tmp_path / f"{n}.jsonl")
        assert len(set(found[:4])) == 4 and len(set(found[4:])) == 5
        drawn.append(found)
    assert drawn[0] == drawn[1] and len({tuple(found) for found in drawn}) == 3


def test_the_command(listed, tmp_path, capsys):
    path = listed(("ten", "random:20%"), ("three", "all"))
    ours = tmp_path / "my" / "train.jsonl"
    assert main(["data", "convert", "--from", "vlm3r", str(path), "--seed", "3", "--out", str(ours)]) == 0
    said = capsys.readouterr().out
    assert "data/ten.json: 2 of 10 records (random:20%)\ndata/three.json: 3 of 3" in said and ": 5 lines" in said
    elsewhere = tmp_path / "lists" / "list.yaml"
    elsewhere.parent.mkdir()
    path.rename(elsewhere)
    command = ["data", "convert", "--from", "vlm3r", str(elsewhere), "--out", str(tmp_path / "other.jsonl")]
    assert main(command) == 2 and "lists/data/ten.json does not exist" in capsys.readouterr().err
    assert main([*command, "--root", str(tmp_path)]) == 0
    assert main(["data", "convert", str(elsewhere), "--seed", "1", "--out", str(tmp_path / "new.jsonl")]) == 2
    assert "--seed is for --from vlm3r" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "`video` must be a path below the folder of all videos, got None"),
        ({"video": "/scannet/a.mp4"}, "`video` must be a path below .*, got '/scannet/a.mp4'"),
        ({"video": "scannet/../../a.mp4"}, "`video` must be a path below"),
        ({"video": "https://a/b.mp4"}, "`video` must be a path below"),
        ({"conversations": None}, "conversations must be a list of messages"),
        ({"conversations": [{"from": "human", "value": "<image>"}]}, "turns must alternate human, gpt"),
        ({"conversations": record(1)["conversations"][:1] + [{"from": "gpt", "value": " "}]}, "an answer must not be"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "4"}]}, "2 <image>"),
    ],
)
def test_a_record_that_cannot_be_learned_is_named_or_left_out(listed, tmp_path, changes, message):
    path = listed(("three", "all"))
    rows = [json.dumps(one) for one in (record(20), record(21, **changes), record(22))]
    (tmp_path / "data" / "three.json").write_text("[" + ",\n".join(rows) + "]")
    with pytest.raises(ValueError, match=f"data/three.json:2: value 2: .*{message}.*--skip-bad"):
        convert(path, tmp_path / "out.jsonl", origin=VLM3R())
    made = convert(path, tmp_path / "out.jsonl", skip=True, origin=VLM3R())
    assert ids(tmp_path / "out.jsonl") == [20, 22] and "three.json:2: value 2" in made.skipped[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: [", r"list.yaml:\d: a list of data must be YAML"),
        ("- a", "`datasets` must be a list"),
        ("datasets: []", "`datasets` must be a list"),
        ("datasets: [{json_path: 3}]", "datasets.0 must have a text `json_path`"),
        ("datasets: [{json_path: data/ten.json, data_root: x}]", "datasets.0 may have .* alone, got 'data_root'"),
        (
            "datasets: [{json_path: data/ten.json, sampling_strategy: last:3}]",
            "datasets.0.sampling_strategy must be all",
        ),
        ("datasets: [{json_path: data/ten.json, sampling_strategy: 'first:0'}]", "got 'first:0'"),
        ("datasets: [{json_path: data/ten.json, sampling_strategy: 'first:101%'}]", "got 'first:101%'"),
        ("datasets: [{json_path: data/ten.json}, {json_path: ../a.json}]", "datasets.1.json_path: data may only name"),
        ("datasets: [{json_path: /etc/passwd}]", "datasets.0.json_path: data may only name files below its root"),
        ("datasets: [{json_path: data}]", "datasets.0.json_path: .* a folder, no file"),
        ("datasets: !!python/object/apply:os.getcwd []", "a list of data must be YAML"),
    ],
)
def test_a_list_that_cannot_be_followed(listed, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        convert(listed(text=text), tmp_path / "out.jsonl", origin=VLM3R())
    assert not (tmp_path / "out.jsonl").exists()
