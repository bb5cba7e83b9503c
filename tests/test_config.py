import dataclasses
import json
import textwrap
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vlmem_jax.config import ConfigError, build, load, override, to_dict


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    learning_rate: float = 1e-3
    trainable: tuple[str, ...] = (".*",)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    name: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float | None = 1.0

    def __post_init__(self):
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive or none; got {self.clip_norm}")


@dataclasses.dataclass(frozen=True)
class Run:
    steps: int
    optimizer: Optimizer = Optimizer()
    stages: tuple[Stage, ...] = ()
    memory: Literal["none", "comemo"] = "none"
    cache: Literal["none", "disk"] | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    shuffle: bool = True
    init: str | None = None
    best: Stage | None = None


def message(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


# load


def config_file(folder, text: str) -> str:
    path = folder / "experiment.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_load_runs_get_config_with_the_profile(tmp_path):
    path = config_file(
        tmp_path,
        """
        from ml_collections import ConfigDict
        def get_config(profile=None):
            return ConfigDict({"profile": profile})
        """,
    )
    assert load(path).profile is None
    assert load(path + ":small").profile == "small"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1", "must define get_config"),
        ("def get_config(profile=None): return {}", "must return a ConfigDict; got dict"),
        ("def get_config(:", "experiment.py:1: "),
    ],
)
def test_load_names_the_file_and_what_is_wrong_with_it(tmp_path, text, expected):
    path = config_file(tmp_path, text)
    assert expected in message(load, path)
    assert path in message(load, path)


def test_load_wants_a_python_file(tmp_path):
    assert "no file 'nowhere.py'" in message(load, "nowhere.py:tiny")
    other = tmp_path / "config.json"
    other.write_text("{}")
    assert "ends in .py" in message(load, str(other))


# override


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-4", 1e-4),
        ("true", True),
        ("False", False),
        ("None", None),
        ("none", "none"),
        ("(1, 2)", (1, 2)),
        ("['a', 'b']", ["a", "b"]),
        ("adamw", "adamw"),
        ("data/train.jsonl", "data/train.jsonl"),
        ("'3'", "3"),
        ("a.b(", "a.b("),
        ("", ""),
    ],
)
def test_text_is_a_literal_where_it_is_one(text, value):
    assert override(ConfigDict({"key": 0}), {"key": text}).key == value


def experiment() -> ConfigDict:
    stages = [{"name": "pretrain", "steps": 10}, {"name": "finetune", "steps": 20}]
    return ConfigDict({"steps": 5, "optimizer": {"name": "adamw"}, "stages": stages, "init": None})


def test_override_leaves_the_original_alone():
    config = experiment()
    changed = override(config, {"optimizer.name": "muon", "stages.pretrain.steps": "3"})
    assert changed.optimizer.name == "muon"
    assert changed.stages[0]["steps"] == 3
    assert config == experiment()


def test_override_changes_type_and_locked_configs():
    config = experiment().lock()
    assert override(config, {"init": "runs/one", "optimizer": "{'name': 'muon'}"}).init == "runs/one"
    assert override(config, {"optimizer.name": 7}).optimizer.name == 7


def test_override_makes_keys_and_groups_that_are_not_there():
    changed = override(experiment(), {"optimizer.clip_norm": "0.5", "mesh.data": "2", "init.folder": "x"})
    assert changed.optimizer.clip_norm == 0.5
    assert changed.mesh.data == 2
    assert changed.init.folder == "x"


@pytest.mark.parametrize("stages", [list, tuple])
def test_list_elements_go_by_index_or_name(stages):
    config = experiment()
    config.stages = stages(config.stages)
    changed = override(config, {"stages.finetune.steps": "7", "stages.0.learning_rate": "0.1"})
    assert [dict(stage) for stage in changed.stages] == [
        {"name": "pretrain", "steps": 10, "learning_rate": 0.1},
        {"name": "finetune", "steps": 7},
    ]


def test_the_index_behind_the_last_adds_an_element():
    changed = override(experiment(), {"stages.2.name": "more", "stages.2.steps": "3"})
    assert [stage["name"] for stage in changed.stages] == ["pretrain", "finetune", "more"]
    assert changed.stages[2]["steps"] == 3


def test_override_refuses_paths_that_lead_nowhere():
    assert "did you mean config.stages.pretrain?" in message(override, experiment(), {"stages.pretrian.steps": "3"})
    assert "config.stages has 2 elements" in message(override, experiment(), {"stages.3.steps": "3"})
    assert "config.steps is 5 (int), not a group" in message(override, experiment(), {"steps.more": "3"})
    assert "empty" in message(override, experiment(), {"optimizer..name": "3"})


# build


def test_build_nests():
    run = build(Run, experiment())
    assert run.optimizer == Optimizer()
    assert run.stages == (Stage("pretrain", 10), Stage("finetune", 20))


def test_int_passes_as_float_and_list_as_tuple():
    run = build(Run, {"steps": 1, "optimizer": {"betas": [0, 1], "clip_norm": 2}, "weights": {"a": 1}})
    assert run.optimizer.betas == (0.0, 1.0)
    assert type(run.optimizer.clip_norm) is float
    assert type(run.weights["a"]) is float


def test_none_in_text_is_none_only_where_the_type_says_so():
    run = build(
        Run, {"steps": 1, "init": "none", "memory": "none", "cache": "none", "optimizer": {"clip_norm": "none"}}
    )
    assert run.init is None
    assert run.optimizer.clip_norm is None
    assert run.memory == "none"
    assert run.cache == "none"


def test_free_groups_become_plain_python():
    run = build(Run, ConfigDict({"steps": 1, "model": {"vision": {"width": 8}, "list": (1, 2)}}))
    assert run.model == {"vision": {"width": 8}, "list": [1, 2]}
    assert type(run.model["vision"]) is dict


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"step": 1}, "unknown key config.step; did you mean config.steps?"),
        ({"steps": 1, "optimizer": {"nmae": "muon"}}, "config.optimizer.nmae; did you mean config.optimizer.name?"),
        (
            {"steps": 1, "stages": [{"name": "a", "stesp": 1}]},
            "config.stages.0.stesp; did you mean config.stages.0.steps?",
        ),
        ({"steps": 1, "optimizer": {"zzz": 1}}, "config.optimizer.zzz; valid here: name, betas, clip_norm"),
        ({}, "config.steps must be given"),
        ({"steps": 1, "best": {"name": "a"}}, "config.best.steps must be given"),
        ({"steps": "ten"}, "config.steps must be int; got 'ten' (str)"),
        ({"steps": 1.0}, "config.steps must be int; got 1.0 (float)"),
        ({"steps": True}, "config.steps must be int; got True (bool)"),
        ({"steps": None}, "config.steps must be int; got None (NoneType)"),
        ({"steps": 1, "shuffle": 1}, "config.shuffle must be bool; got 1 (int)"),
        ({"steps": 1, "init": 3}, "config.init must be str; got 3 (int)"),
        ({"steps": 1, "optimizer": 3}, "config.optimizer must be a group of keys; got 3 (int)"),
        ({"steps": 1, "optimizer": {"betas": [0.9]}}, "config.optimizer.betas must have 2 elements; got 1"),
        ({"steps": 1, "optimizer": {"betas": [0.9, "x"]}}, "config.optimizer.betas.1 must be float; got 'x' (str)"),
        ({"steps": 1, "stages": "pretrain"}, "config.stages must be tuple["),
        ({"steps": 1, "weights": [1.0]}, "config.weights must be dict[str, float]; got [1.0] (list)"),
        ({"steps": 1, "memory": "comeno"}, "config.memory must be one of 'none', 'comemo'; got 'comeno', did you mean"),
        (
            {"steps": 1, "optimizer": {"clip_norm": -1}},
            "config.optimizer: clip_norm must be positive or none; got -1.0",
        ),
    ],
)
def test_build_names_the_key_and_the_rule(values, expected):
    assert expected in message(build, Run, ConfigDict(values))


def test_where_stands_before_every_key():
    with pytest.raises(ConfigError, match=r"^model\.json\.steps must be int"):
        build(Run, {"steps": "x"}, where="model.json")


# to_dict

stages = st.builds(
    Stage,
    name=st.text(),
    steps=st.integers(),
    learning_rate=st.floats(allow_nan=False),
    trainable=st.lists(st.text(), max_size=3).map(tuple),
)
runs = st.builds(
    Run,
    steps=st.integers(),
    optimizer=st.builds(Optimizer, clip_norm=st.none() | st.floats(0.1, 9)),
    stages=st.lists(stages, max_size=3).map(tuple),
    memory=st.sampled_from(["none", "comemo"]),
    weights=st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=3),
    model=st.dictionaries(st.text(), st.integers() | st.lists(st.booleans()), max_size=3),
    init=st.none() | st.text().filter(lambda text: text != "none"),
    best=st.none() | stages,
)


@given(runs)
def test_a_round_trip_through_json_gives_an_equal_dataclass(run):
    assert build(Run, json.loads(json.dumps(to_dict(run)))) == run


# kinds


@dataclasses.dataclass(frozen=True)
class Round:
    radius: float
    kind: Literal["round"] = "round"


@dataclasses.dataclass(frozen=True)
class Square:
    side: int
    kind: Literal["square"] = "square"


@dataclasses.dataclass(frozen=True)
class Picture:
    shape: Round | Square


def test_a_group_says_of_which_kind_it_is():
    assert build(Picture, {"shape": {"radius": 1}}).shape == Round(1.0)
    square = build(Picture, {"shape": {"kind": "square", "side": 2}})
    assert square.shape == Square(2) and build(Picture, to_dict(square)) == square
    assert build(Picture, {"shape": Square(2)}) == square


@pytest.mark.parametrize(
    "shape, message",
    [
        ({"kind": "oval"}, r"config.shape.kind must be one of round, square; got 'oval'"),
        ({"kind": "square", "sid": 2}, r"unknown key config.shape.sid; did you mean config.shape.side\?"),
        ({"kind": "square", "side": 2.5}, "config.shape.side must be int; got 2.5"),
        ({"side": 2}, "unknown key config.shape.side"),
        (3, "config.shape must be a group of keys; got 3"),
    ],
)
def test_errors_name_the_key_of_that_kind(shape, message):
    with pytest.raises(ConfigError, match=message):
        build(Picture, {"shape": shape})
