"""A stage that trains an adapter alone, from a checkpoint that has none."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.drawn import random_params
from tests.train import world
from vlmem_jax.checkpoint import find, load_params, save_params
from vlmem_jax.checkpoint.store import parameter_paths
from vlmem_jax.config import ConfigError, override, to_dict
from vlmem_jax.generate import load_model
from vlmem_jax.models import VLM
from vlmem_jax.train.config import experiment
from vlmem_jax.train.run import run
from vlmem_jax.trees import flatten

ADAPTERS = [dict(name="mine", rank=2, targets=("q", "down"), vision=("v",)), dict(name="idle", rank=1)]
STAGE = dict(name="lora", steps=3, learning_rate=1e-2, trainable=["adapters/mine/"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(folder):
    """A checkpoint of the model without memory and without adapters."""
    settings = experiment(override(world.config(folder), {"model.memory": "none"}))
    save_params(folder / "base" / "0", random_params(VLM(settings.model)))
    about = {"model": to_dict(settings.model), "image": to_dict(settings.image), "system": ""}
    (folder / "base" / "model.json").write_text(json.dumps(about))
    return folder / "base"


@pytest.fixture(scope="module")
def settings(folder, base):
    keys = dict(stages=[STAGE], init=str(base), eval_every=10)
    config = world.config(folder, checkpoint=dict(every=1, keep_last=9, keep_best=0, content="trained"), **keys)
    changes = {"model.memory": "none", "model.adapters": ADAPTERS, "data.eval": []}
    return lambda **more: experiment(override(config, changes | more))


@pytest.fixture(scope="module")
def trained(folder, settings):
    said = []
    assert run(settings(), folder / "run", say=said.append)
    assert "and new adapters, trains" in said[0]
    return folder / "run"


def test_the_adapter_learns_and_nothing_else_moves(trained, base, settings):
    assert all(path.startswith("adapters/mine/") for path in parameter_paths(trained / "lora" / "3"))
    vlm = VLM(settings().model)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), vlm.abstract())
    after = flatten(load_params(trained / "lora" / "3", target))
    plain = {name: part for name, part in target.items() if name != "adapters"}
    for path, leaf in flatten(load_params(base / "0", plain)).items():
        np.testing.assert_array_equal(after[path], leaf)
    moved = {path for path in after if path.startswith("adapters/") and path.endswith("/b") and np.any(after[path])}
    assert moved == {f"adapters/mine/{x}/b" for x in ("decoder/q", "decoder/down", "vision/v")}
    losses = list(world.losses(trained).values())
    assert losses[-1] < losses[0]


def test_it_goes_on_from_a_checkpoint_to_the_same_numbers(trained, folder, settings):
    shutil.copytree(trained, folder / "cut")
    shutil.rmtree(folder / "cut" / "lora" / "3")
    assert run(settings(), folder / "cut")
    assert world.losses(folder / "cut") == world.losses(trained)


def test_answers_come_through_the_adapter_or_past_it(trained, base):
    """The default is the first; `none` is the base."""
    found = {name: load_model(trained, adapter=name) for name in (None, "mine", "none", "idle")}
    assert [found[name].vlm.adapter for name in found] == [0, 0, -1, 1]
    with pytest.raises(ValueError, match="the adapter must be none, mine, idle; got 'mien'"):
        load_model(trained, adapter="mien")
    assert find(trained).model["model"]["adapters"][0]["name"] == "mine"


def test_a_stage_names_an_adapter_that_there_is(settings):
    named = settings(**{"stages.lora.adapter": "idle"})
    assert named.model_of(named.stages[0]).adapter == 1
    with pytest.raises(ConfigError, match="stages.lora.adapter: the adapter must be none, mine, idle; got 'my'"):
        settings(**{"stages.lora.adapter": "my"})
