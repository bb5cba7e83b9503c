import json

import pytest

from vlmem_jax.checkpoint import find


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"model": {"memory": "none"}}))
    (tmp_path / "config.json").write_text(json.dumps({"stages": [{"name": "b"}, {"name": "a"}, {"name": "later"}]}))
    for step in ("b/10", "a/5", "a/20"):
        (tmp_path / step / "params").mkdir(parents=True)
    return tmp_path


def test_a_workdir_means_the_newest_step_of_its_last_started_stage(workdir):
    assert find(workdir).step_folder == workdir / "a" / "20"


def test_a_stage_means_its_newest_step_and_a_step_itself(workdir):
    assert find(workdir / "b").step_folder == workdir / "b" / "10"
    assert find(workdir / "a" / "5").step_folder == workdir / "a" / "5"
    assert find(workdir / "a" / "5").root == workdir


def test_a_converted_checkpoint_has_its_step_at_the_top(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "0" / "params").mkdir(parents=True)
    assert find(tmp_path).step_folder == tmp_path / "0"
    assert find(tmp_path).tokenizer == tmp_path / "tokenizer"


def test_model_json_is_read(workdir):
    assert find(workdir / "b").model == {"model": {"memory": "none"}}


def test_says_what_is_missing(tmp_path, workdir):
    (workdir / "later").mkdir()
    with pytest.raises(ValueError, match="there is no folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no committed checkpoint yet"):
        find(workdir / "later")
    (workdir / "model.json").unlink()
    with pytest.raises(ValueError, match="must hold model.json"):
        find(workdir)
