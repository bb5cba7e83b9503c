import json

import jax
import numpy as np
import pytest

from vlmem_jax.checkpoint import find, folder, load_params, save_params


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"model": {"memory": None}}))
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
    assert find(workdir / "b").model == {"model": {"memory": None}}


def test_says_what_is_missing(tmp_path, workdir):
    (workdir / "later").mkdir()
    with pytest.raises(ValueError, match="there is no folder"):
        find(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no committed checkpoint yet"):
        find(workdir / "later")
    (workdir / "model.json").unlink()
    with pytest.raises(ValueError, match="must hold model.json"):
        find(workdir)


def test_what_a_step_does_not_hold_is_read_from_its_base(tmp_path):
    everything = {"a": {"x": np.arange(6.0).reshape(2, 3), "y": np.ones(4)}, "b": np.zeros((2, 2))}
    save_params(tmp_path / "elsewhere" / "0", everything)
    folder.set_base(tmp_path / "run", tmp_path / "elsewhere" / "0")
    step = tmp_path / "run" / "tune" / "7"
    save_params(step, {"a": {"y": np.full(4, 5.0)}})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=place), everything)
    assert folder.base_of(step) == tmp_path / "elsewhere" / "0" and folder.base_of(tmp_path / "elsewhere" / "0") is None
    found = load_params(step, target)
    np.testing.assert_array_equal(found["a"]["y"], 5)
    np.testing.assert_array_equal(found["a"]["x"], everything["a"]["x"])
    wide = {**target, "b": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=place), "c": target["b"]}
    with pytest.raises(ValueError, match=r"elsewhere.*2 arrays differ:\n  b: \(2, 2\).*\n  c: not in the checkpoint"):
        load_params(step, wide)

    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"elsewhere/0, is not there; put it back, or write its new place into .*base"):
        load_params(step, target)
    save_params(tmp_path / "elsewhere" / "0", {**everything, "b": np.ones((2, 2))})
    with pytest.raises(ValueError, match="is another one now"):
        load_params(step, target)


def test_a_base_within_the_run_moves_with_it(tmp_path):
    save_params(tmp_path / "run" / "base" / "0", {"x": np.ones(3), "y": np.ones(3)})
    folder.set_base(tmp_path / "run", tmp_path / "run" / "base" / "0")
    save_params(tmp_path / "run" / "tune" / "1", {"x": np.zeros(3)})
    (tmp_path / "run").rename(tmp_path / "moved")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = dict.fromkeys("xy", jax.ShapeDtypeStruct((3,), np.float32, sharding=place))
    found = load_params(tmp_path / "moved" / "tune" / "1", target)
    assert found["x"].sum() == 0 and found["y"].sum() == 3
