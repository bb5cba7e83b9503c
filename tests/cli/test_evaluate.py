"""An evaluation from the command line, from the table to what is refused."""

import json

import jax
import pytest

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
    assert list(rows) == ["source", "letters", "prompts", "all", "*", f"{tmp_path}/summary.json:"]
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
        (["--context", "less"], "context must be all, thumbnail, pooled:k, stride:n or kept:n"),
    ],
)
def test_bad_input_is_one_plain_line(checkpoint, tmp_path, capsys, arguments, message):
    assert run(checkpoint, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
