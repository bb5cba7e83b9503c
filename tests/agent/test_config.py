"""Presets of the agent, and what is said of a config that cannot be used."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from vlmem_jax import agent
from vlmem_jax.agent.config import PRESETS, AgentConfig, resolve
from vlmem_jax.agent.gates import OPTIONS
from vlmem_jax.agent.retrieve import RELEASE
from vlmem_jax.config import ConfigError, build, to_dict


def test_the_default_is_what_the_sections_say():
    assert resolve({}) == resolve("default") == AgentConfig()


def test_the_release():
    """The settings of MM-Mem's release that its code reads."""
    assert to_dict(resolve("release")) == {
        "ingest": {"threshold": 20.0, "quiet": 15, "longest": 10.0, "tail": 0.0, "fps": 5.0, "side": 0, "quality": 95},
        "build": {
            "manage": {"images": 64, "reserved": 0}, "fps": 2.0, "schema_fps": 1.0, "images": 0, "whole": True,
            "told": "captions", "attempts": 5,
        },
        "schema": {"same": 0.7, "found": 0.5, "first": 20, "kept": 5},
        "retrieve": to_dict(RELEASE) | {
            "gamma": 0.5, "initial": 0.8, "episodes": 3, "segments": 3, "nearest": 10, "images": 0,
        },
        "show": {"tokens": 0, "answer_tokens": 0},
        "index": "words",
    }  # fmt: skip


def test_the_paper():
    """Table 5: episodes, segments, and one bound of the entropy for any number of options."""
    retrieve = resolve("paper").retrieve
    assert (retrieve.episodes, retrieve.segments, retrieve.gamma, retrieve.scaled) == (2, 1, 0.72, False)
    assert resolve("paper").build.told == "either", "subtitles or captions"
    assert retrieve.worse > math.log(len(OPTIONS)) and retrieve.is_kept and not retrieve.initial


def keys(section):
    """Names of all keys, those of sections below, too."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        yield from keys(value) if dataclasses.is_dataclass(value) else [field.name]


def test_every_key_is_read_somewhere():
    """The release has keys that nothing reads."""
    code = "".join(file.read_text() for file in Path(agent.__file__).parent.glob("*.py"))
    for key in keys(AgentConfig()):
        assert re.search(rf"(config|ingest|manage|retrieve|build|schema|asked)\.{key}\b", code), key


def test_presets_are_changed_key_by_key():
    config = resolve(ConfigDict({"preset": "release", "build": {"manage": {"images": 32}}, "schema": {"kept": 4}}))
    assert (config.build.manage.images, config.build.manage.reserved, config.build.attempts) == (32, 0, 5)
    assert config.schema.kept == 4 and config.retrieve == RELEASE
    assert resolve("release").build.manage.images == 64, "the preset is as it was"


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_written_down_is_read_again(preset):
    config = resolve(preset)
    assert build(AgentConfig, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


@pytest.mark.parametrize(
    "given, message",
    [
        ("papr", "config.agent.preset must be one of default, paper, release; got 'papr'"),
        ({"retreive": {}}, "unknown key config.agent.retreive; did you mean config.agent.retrieve"),
        ({"build": {"manage": {"image": 3}}}, "unknown key config.agent.build.manage.image; did you mean"),
        ({"build": {"manage": {"images": 8}}}, "config.agent.build.manage: reserved must be below images=8, got 16"),
        ({"ingest": {"fps": 0.0}}, "config.agent.ingest: fps must be above 0, got 0.0"),
        ({"schema": {"kept": 1.5}}, "config.agent.schema.kept must be int; got 1.5"),
        ({"index": "word"}, "config.agent.index must be one of 'concepts', 'words'; got 'word', did you mean 'words'"),
        ({"retrieve": {"images": 4}}, "config.agent: an answer must show a frame of each node that it takes, up to 5"),
    ],
)
def test_what_cannot_be_used(given, message):
    with pytest.raises(ConfigError) as raised:
        resolve(given)
    assert message in str(raised.value)
