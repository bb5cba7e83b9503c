"""An evaluation gives what each prompt gives alone, goes on where it stopped, and refuses what does not belong."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.evals import world
from vlmem_jax.config import ConfigError
from vlmem_jax.data import Prompts, SourceConfig
from vlmem_jax.evals import EvalConfig, evaluate
from vlmem_jax.evals.answers import random_keys
from vlmem_jax.generate import InvocationConfig, Pool, Request, SamplingConfig, Transcript

NEW = 12
DRAWN = SamplingConfig(max_new_tokens=NEW, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the prompts lie."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module")
def model(folder):
    return world.model(folder)


@pytest.fixture(scope="module")
def config(folder):
    """As a function of what differs."""

    def make(of=folder, **changes):
        data = (SourceConfig(str(of / "prompts.jsonl")),)
        return EvalConfig(**{"data": data, "metric": "substr", "sampling": DRAWN, "batch_size": 2} | changes)

    return make


@pytest.fixture(scope="module")
def whole(model, config, tmp_path_factory):
    """Folder and summary of an evaluation that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, evaluate(model, config(without_memory=True), output)


def answers(file):
    """What does not depend on the clock, by name."""
    costs = "seconds", "batch_size", "compiled", "peak_memory_gb"
    found = {line["name"]: line for line in world.lines(file)}
    return {name: {key: value for key, value in line.items() if key not in costs} for name, line in found.items()}


def test_each_answer_is_that_of_the_prompt_alone(model, config, whole):
    prompts, pool, memories = Prompts(config().data, model.processor), Pool(model.generator(), 2), 0
    pool.submit([Request(prompts.sample((0, n)), DRAWN) for n in range(1, 5)])  # room for all, as in the evaluation
    pool.engine.run()
    for name, invocation in ("samples", InvocationConfig()), ("without_memory", InvocationConfig("never")):
        found = answers(whole[0] / f"{name}.jsonl")
        assert len(found) == 5
        for n in range(1, 5):
            [key_2] = np.asarray(jax.random.key_data(random_keys(DRAWN.seed, [(0, n)])))
            [handle] = pool.submit([Request(prompts.sample((0, n)), DRAWN, invocation, key_2)])
            transcript = Transcript(model.processor.tokenizer, model.vlm.speech)
            for token in handle.result():
                transcript.push(token)
            line = found[prompts.name((0, n))]
            assert line["output"] == transcript.text + transcript.flush()
            assert line["memories"] == [list(each) for each in transcript.called]
            memories += len(line["memories"])
    assert memories and not any(line["memories"] for line in found.values())


def test_lines_and_summary(whole):
    output, summary = whole
    lines = world.lines(output / "samples.jsonl")
    assert json.loads((output / "summary.json").read_text()) == summary
    for line in lines:
        wanted = [answer.lower() in line["output"].lower() for answer in line["answers"]]
        assert line["score"] == (float(any(wanted)) if wanted else None)
        assert line["seconds"] > 0 and line["peak_memory_gb"] > 0
    by_id = {line["id"]: line for line in lines}
    assert by_id["last"]["score"] is None and by_id["0"]["source"] == "letters" and by_id["2"]["source"] == "prompts"
    scores = [line["score"] for line in lines if line["source"] == "letters"]
    assert summary["sources"]["letters"]["accuracy"] == sum(scores) / 2
    assert (summary["samples"], summary["scored"], summary["skipped"]) == (5, 4, 0)
    assert summary["invocation"]["per_sample"] == sum(len(line["memories"]) for line in lines) / 5
    assert summary["without_memory"]["invocation"]["per_sample"] == 0


def test_an_evaluation_that_was_killed_goes_on(model, config, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmem_jax.evals.run.WINDOW", 1)  # read two prompts at a time
    done = []

    def stop(file, now, total):
        done.append((now, total))
        if now == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(model, config(), tmp_path, stop)
    assert done == [(0, 5), (1, 5), (2, 5)]
    file = tmp_path / "samples.jsonl"
    kept = file.read_text()
    file.write_text(kept + '{"name": "half a li')
    done.clear()
    evaluate(model, config(), tmp_path, lambda file, now, total: done.append(now))
    assert done == [2, 3, 4, 5] and file.read_text().startswith(kept)
    assert answers(file) == answers(whole[0] / "samples.jsonl")


def test_a_second_pass_may_come_later(model, config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "out")
    (tmp_path / "out" / "without_memory.jsonl").unlink()
    calls = []
    summary = evaluate(model, config(without_memory=True), tmp_path / "out", lambda *of: calls.append(of[:2]))
    assert calls[0] == ("samples.jsonl", 5) and calls[1] == ("without_memory.jsonl", 0)
    assert summary["without_memory"]["accuracy"] == whole[1]["without_memory"]["accuracy"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(sampling=SamplingConfig(NEW, 0.5, seed=3)),
            "sampling.temperature was 1.0, now 0.5; give another --output",
        ),
        (dict(invocation=InvocationConfig("always")), "invocation.mode was learned, now always"),
        (dict(metric="exact"), "metric was substr, now exact"),
    ],
)
def test_other_settings_are_refused(model, config, whole, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, config(**changes), whole[0])


def test_other_data_and_another_model_are_refused(model, config, whole, tmp_path):
    retrained = world.model(tmp_path, seed=2)
    with pytest.raises(ValueError, match=f"content of {tmp_path}/prompts.jsonl was None, now"):
        evaluate(model, config(tmp_path), whole[0])
    with pytest.raises(ValueError, match="out holds .* parameters of the checkpoint was"):
        evaluate(retrained, config(), whole[0])


def test_bad_lines_stop_the_run_or_are_skipped_and_counted(folder, model, config, tmp_path):
    shutil.copy(folder / "0.png", tmp_path)
    good, lost = (
        {"prompt": "Say b", "image": "0.png", "answer": "b"},
        {"prompt": "What?", "image": "lost.png", "answer": "a"},
    )
    judged = {"prompt": "Well?", "answer": "good", "answer_type": "judge"}
    world.write(tmp_path, good, "not JSON", lost, judged)
    of = dict(of=tmp_path, metric="answer")
    with pytest.raises(ValueError, match="prompts.jsonl:2: a line must be one JSON object.*--on-bad-sample skip"):
        evaluate(model, config(**of), tmp_path / "out")
    summary = evaluate(model, config(**of, on_bad_sample="skip"), tmp_path / "out")
    assert (summary["samples"], summary["skipped"]) == (1, 3)
    errors = {line["name"][-1]: line["error"] for line in world.lines(tmp_path / "out" / "samples.jsonl")[:3]}
    assert "JSON" in errors["2"] and "lost.png" in errors["3"] and "judge" in errors["4"]
    with pytest.raises(ValueError, match="prompts.jsonl:2"):
        evaluate(model, config(**of), tmp_path / "out")


def boom(output, prompt):
    """A metric."""
    return {"b": 1.0}[prompt.answers[0]]


def test_a_metric_of_ones_own_that_raises(folder, model, config, tmp_path):
    shutil.copy(folder / "0.png", tmp_path)
    world.write(tmp_path, *({"prompt": f"Say {x}", "image": "0.png", "answer": x} for x in "bc"))
    of = dict(of=tmp_path, metric="tests.evals.test_run:boom")
    with pytest.raises(ValueError, match=r"raised KeyError.*prompts.jsonl:2.*\); --on-bad-sample skip"):
        evaluate(model, config(**of), tmp_path / "out")
    summary = evaluate(model, config(**of, on_bad_sample="skip"), tmp_path / "out")
    assert (summary["accuracy"], summary["skipped"]) == (1.0, 1)
    with pytest.raises(ConfigError, match="metric.0.name must be one of exact"):
        evaluate(model, config(metric="exakt"), tmp_path / "other")


def test_a_model_without_speech_has_no_numbers_of_invocations(config, tmp_path):
    model = world.model(tmp_path, memory=None)
    summary = evaluate(model, config(tmp_path), tmp_path / "out")
    assert summary["samples"] == 5 and "invocation" not in summary
    assert all("memories" not in line for line in world.lines(tmp_path / "out" / "samples.jsonl"))
    with pytest.raises(ConfigError, match="--without-memory needs a model whose memory speaks.*model.memory is none"):
        evaluate(model, config(without_memory=True), tmp_path / "out")


def test_bad_configs():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        EvalConfig((SourceConfig("a.jsonl"),), batch_size=0)
    with pytest.raises(ValueError, match="a file must be given once, got a.jsonl"):
        EvalConfig((SourceConfig("a.jsonl"), SourceConfig("a.jsonl")))
