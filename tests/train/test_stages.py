import jax
import jax.numpy as jnp
import pytest

from vlmem_jax.train.config import StageConfig
from vlmem_jax.train.stages import Split, storage
from vlmem_jax.trees import flatten, unflatten

PATHS = ["vision/patch/kernel", "projector/fc1/kernel", "memory/blocks/attn_gate", "memory/blocks/attn/q/kernel"]


def split(**changes):
    return Split.of(StageConfig("s", 1, 1.0, **changes), PATHS)


def test_by_default_everything_is_trained():
    assert split().trainable == set(PATHS) and not split().frozen


def test_frozen_takes_out_of_trainable():
    chosen = split(trainable=("projector/", "memory/"), frozen=(".*_gate",))
    assert chosen.trainable == {"projector/fc1/kernel", "memory/blocks/attn/q/kernel"}
    assert chosen.frozen == {"vision/patch/kernel", "memory/blocks/attn_gate"}


def test_a_pattern_that_matches_nothing_here_is_no_error():
    assert split(trainable=("projector/", "another_memory/")).trainable == {"projector/fc1/kernel"}


def test_a_stage_that_trains_nothing_is():
    with pytest.raises(ValueError, match=r"stages.s trains nothing: trainable \['vission'\].*vision/patch/kernel"):
        split(trainable=("vission",))


def test_frozen_matrices_are_held_in_the_compute_dtype():
    shapes = {path: jax.ShapeDtypeStruct((2, 2), jnp.float32) for path in PATHS}
    axes = {path: ("scalar",) if "gate" in path else ("embed", "mlp") for path in PATHS}
    held = storage(split(trainable=("projector/",)), shapes, axes, dict.fromkeys(PATHS), jnp.bfloat16)
    assert {path: leaf.dtype.name for path, leaf in held.items()} == {
        "vision/patch/kernel": "bfloat16",
        "projector/fc1/kernel": "float32",
        "memory/blocks/attn_gate": "float32",
        "memory/blocks/attn/q/kernel": "bfloat16",
    }


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2}
    assert unflatten(flatten(tree)) == tree
