import dataclasses
import json

import pytest

from tests.train import standin
from vlmem_jax.config import ConfigError, build
from vlmem_jax.train.config import StageConfig, experiment
from vlmem_jax.train.workdir import prepare


@pytest.fixture
def settings(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "model.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    stages = (StageConfig("a", 5, 0.1), StageConfig("b", 5, 0.1))
    return dataclasses.replace(standin.experiment(tokenizer=str(folder)), stages=stages)


def start(workdir, *stages):
    for stage in stages:
        (workdir / stage / "3" / "params").mkdir(parents=True)


def test_what_is_written_can_be_read_again(tmp_path, settings):
    prepare(tmp_path / "run", settings)
    assert experiment(json.loads((tmp_path / "run" / "config.json").read_text())) == settings
    assert (
        build(type(settings.image), json.loads((tmp_path / "run" / "model.json").read_text())["image"])
        == settings.image
    )
    assert [file.name for file in (tmp_path / "run" / "tokenizer").iterdir()] == ["tokenizer.json"], "no weights"


def test_the_same_again_and_other_ways_to_run_it_are_fine(tmp_path, settings):
    prepare(tmp_path, settings)
    start(tmp_path, "a", "b")
    prepare(tmp_path, settings)
    prepare(tmp_path, dataclasses.replace(settings, log_every=77))
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 77


def test_a_key_that_is_new_since_the_run_began_has_its_default_there(tmp_path, settings):
    prepare(tmp_path, settings)
    start(tmp_path, "a", "b")
    written = json.loads((tmp_path / "config.json").read_text())
    del written["seed"], written["stages"][0]["accumulation"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    prepare(tmp_path, settings)
    written["no_key_any_more"] = 1
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(ConfigError, match="no_key_any_more: 1 there, None now"):
        prepare(tmp_path, settings)


def test_what_changes_the_numbers_is_refused_with_every_key(tmp_path, settings):
    prepare(tmp_path, settings)
    start(tmp_path, "a")
    other = dataclasses.replace(settings, seed=1, optimizer=dataclasses.replace(settings.optimizer, b1=0.8))
    with pytest.raises(ConfigError) as error:
        prepare(tmp_path, other)
    assert "optimizer.b1: 0.9 there, 0.8 now" in str(error.value) and "seed: 42 there, 1 now" in str(error.value)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 42


def test_a_stage_may_change_until_it_has_a_checkpoint(tmp_path, settings):
    prepare(tmp_path, settings)
    start(tmp_path, "a")
    a, b = settings.stages
    prepare(
        tmp_path, dataclasses.replace(settings, stages=(a, dataclasses.replace(b, steps=9), StageConfig("c", 1, 1.0)))
    )
    start(tmp_path, "b")
    with pytest.raises(ConfigError, match="stages.b.steps: 9 there, 2 now"):
        prepare(tmp_path, dataclasses.replace(settings, stages=(a, dataclasses.replace(b, steps=2))))
    with pytest.raises(ConfigError, match="stages.a.learning_rate: 0.1 there, None now"):
        prepare(tmp_path, dataclasses.replace(settings, stages=(b, StageConfig("c", 1, 1.0))))


def test_the_last_stage_that_was_begun_may_get_other_steps(tmp_path, settings):
    prepare(tmp_path, settings)
    start(tmp_path, "a", "b")
    a, b = settings.stages
    said = []
    prepare(tmp_path, dataclasses.replace(settings, stages=(a, dataclasses.replace(b, steps=8))), said.append)
    assert said == ["stages.b.steps was 5 and is 8; from step 3 on, learning rates are those of 8"]
    assert json.loads((tmp_path / "config.json").read_text())["stages"][1]["steps"] == 8
    with pytest.raises(ConfigError, match="stages.a.steps: 5 there, 6 now"):
        prepare(tmp_path, dataclasses.replace(settings, stages=(dataclasses.replace(a, steps=6), b)))


def test_what_happens_to_bad_samples_may_change(tmp_path, settings):
    skipping = dataclasses.replace(settings.data, on_bad_sample="skip")
    a, b = settings.stages
    own, skips = (
        dataclasses.replace(settings, stages=(dataclasses.replace(a, data=data), b))
        for data in (settings.data, skipping)
    )
    prepare(tmp_path, own)
    start(tmp_path, "a")
    prepare(tmp_path, dataclasses.replace(own, data=skipping))
    prepare(tmp_path, skips)


def test_nothing_is_left_half_written(tmp_path, settings):
    prepare(tmp_path / "run", settings)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_missing_tokenizer_and_a_foreign_checkpoint_are_named(tmp_path, settings):
    with pytest.raises(ConfigError, match="there is no folder 'nowhere'"):
        prepare(tmp_path / "run", dataclasses.replace(settings, tokenizer="nowhere"))
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a checkpoint; start from it with --config.init="):
        prepare(tmp_path, settings)
