"""An evaluation from the command line, from the table to what is refused."""

import json
import re

import jax
import pytest

from tests import patches_world
from tests.evals import world
from vlmem_jax.cli.main import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return world.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def run(checkpoint, output, *arguments):
    files = "--checkpoint", str(checkpoint), "--data", str(checkpoint / "prompts.jsonl"), "--output", str(output)
    return main(["evaluate", *files, "--max-new-tokens", "8", "--temperature", "1", "--batch-size", "8", *arguments])


def test_a_table_is_printed_and_the_same_command_goes_on(checkpoint, tmp_path, capsys):
    flags = "--metric", "substr", "--invocation", "learned", "--max-invocations", "1", "--disable", "long"
    assert run(checkpoint, tmp_path, *flags, "--without-memory") == 0
    table = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    of_compiling = "*"  # a line that is there where all answers had to wait for it
    assert [name for name in rows if name != of_compiling] == [
        "source",
        "letters",
        "prompts",
        "all",
        f"{tmp_path}/summary.json:",
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert rows["all"][2] == f"{100 * summary['accuracy']:.1f}"
    assert 0 < summary["invocation"]["ratio"]["short"] == summary["invocation"]["per_sample"]
    assert summary["invocation"]["ratio"]["long"] == 0
    assert run(checkpoint, tmp_path, *flags, "--without-memory") == 0
    captured = capsys.readouterr()
    assert captured.out == table and "samples.jsonl: 5 of 5 prompts are there" in captured.err
    assert run(checkpoint, tmp_path, "--metric", "substr", "--context", "pooled:2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "invocation.max_invocations was 1, now None; invocation.disabled was ['long'], now []" in error
    assert "context was None, now pooled:2" in error


def test_eight_devices_score_as_one(checkpoint, tmp_path, monkeypatch):
    devices, written = jax.devices(), []
    for count in (8, 1):
        monkeypatch.setattr("jax.devices", lambda count=count: devices[:count])
        assert run(checkpoint, tmp_path / str(count), "--metric", "substr") == 0
        lines = map(json.loads, (tmp_path / str(count) / "samples.jsonl").read_text().splitlines())
        written.append({line["name"]: (line["output"], line["score"]) for line in lines})
    assert written[0] == written[1] and len(written[0]) == 5


@pytest.fixture(scope="module")
def seeing_frames(tmp_path_factory):
    return world.frames_checkpoint(tmp_path_factory.mktemp("frames"))


def test_a_benchmark_is_asked_in_its_words_and_reported_by_length(seeing_frames, tmp_path, capsys):
    questions = [
        {"id": n, "dataset": "scannet", "scene_name": name, "question": "How many?", "ground_truth": "4"}
        | {"question_type": "object_counting"}
        for n, name in enumerate(["short", "long", "short"])
    ]
    (tmp_path / "scannet").mkdir()
    (tmp_path / "test.json").write_text(json.dumps(questions))
    patches_world.save_video(tmp_path / "scannet" / "short.mp4")
    patches_world.save_video(tmp_path / "scannet" / "long.mp4", frames=125, fps=1, level=2)
    command = ["evaluate", "--checkpoint", str(seeing_frames), "--format", "vsibench", "--batch-size", "3"]
    command += ["--data", str(tmp_path / "test.json"), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.split("  +", printed[printed.index("") + 1]) == ["benchmark", "all", "under 1 min", "over 2 min"]
    assert re.split("  +", printed[-3]) == ["samples", "3", "2", "1"]
    assert printed[-2].startswith("4 frames a question, offline, vlmem_jax 0.")
    lines = world.lines(tmp_path / "out" / "samples.jsonl")
    assert sorted((line["frames"], line["length"], line["source"]) for line in lines) == [
        (4, 1.0, "object_counting"), (4, 1.0, "object_counting"), (4, 125.0, "object_counting")
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    asked = {"metric": "vsi", "benchmark": "vsibench", "sampling.max_new_tokens": 16, "sampling.temperature": 0.0}
    assert settings.items() >= (asked | {"image.time_line": False, "image.frames": 4}).items()
    assert main([*command, "--frames", "2", "--time-line", "on", "--max-new-tokens", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "image.frames was 4, now 2; image.time_line was False, now None" in error
    assert "sampling.max_new_tokens was 16, now 3" in error


def test_captions_stand_beside_exact_match(seeing_frames, tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(
        "vlmem_jax.evals.run.captions", lambda lines: (given.append(lines), ({"CIDEr": 1.25}, "why"))[1]
    )
    question = {"scene_id": "a", "question": "Where is it?", "answers": ["here", "there"]}
    (tmp_path / "val.json").write_text(json.dumps([question, {**question, "answers": []}]))
    files = ["--data", str(tmp_path / "val.json"), "--root", str(seeing_frames), "--output", str(tmp_path / "out")]
    assert main(["evaluate", "--checkpoint", str(seeing_frames), "--format", "scanqa", *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line["answers"] for line in given[0]] == [["here", "there"], []]
    rows = {row[0]: row[1:] for row in (re.split("  +", line) for line in printed)}
    assert (rows["exact match"], rows["CIDEr"]) == (["0.0 %", "0.0 %"], ["125.0 %", "-"])
    assert "why" in printed and printed[-1].endswith("1 of 2 answers scored")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--metric", "exakt"], "metric.0.name must be one of exact"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--max-invocations", "9"], "max_invocations must be at most that of the model, 3, got 9"),
        (["--invocation-probability", "0.5"], "is for --invocation delimiter_random, got it with learned"),
        (["--invocation", "delimiter_random", "--invocation-probability", "2"], "probability must be a probability"),
        (["--rope-dhr", "off", "--on-bad-sample", "raise"], "rope_dhr is for images cut into tiles"),
        (["--context", "thumbnail"], "context must be all, pooled:k or stride:n where images are not cut into tiles"),
        (["--frames", "2"], "unknown key image.frames"),
        (["--time-line", "off"], "unknown key image.time_line"),
        (["--context", "less"], "context must be all, thumbnail, pooled:k, stride:n or kept:n"),
    ],
)
def test_bad_input_is_one_plain_line(checkpoint, tmp_path, capsys, arguments, message):
    assert run(checkpoint, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
