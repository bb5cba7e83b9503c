import ml_dtypes
import numpy as np
import pytest

from vlmem_jax.hub.fit import check_fit
from vlmem_jax.records import Rule

RULES = [
    Rule("kernel", tuple(f"layers.{i}.fc.weight" for i in range(4)), "F D -> D F", {"F": 2, "D": 3}, stacked=True),
    Rule("scale", ("norm.weight",), "D -> D", {"D": 3}),
]


def fitting() -> dict[str, np.ndarray]:
    tensors = {f"layers.{i}.fc.weight": np.zeros((2, 3), np.float32) for i in range(4)}
    return tensors | {"norm.weight": np.zeros(3, np.float32)}


def problems(tensors) -> list[str]:
    with pytest.raises(ValueError, match="the folder does not fit the model") as error:
        check_fit(RULES, tensors, "the folder")
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_what_fits_passes():
    check_fit(RULES, fitting() | {"layers.0.rotary_emb.inv_freq": np.zeros(2)}, "the folder")


def test_a_renamed_tensor_is_missing_and_unknown_and_each_points_to_the_other():
    tensors = fitting()
    tensors["norm.wait"] = tensors.pop("norm.weight")
    assert problems(tensors) == [
        "missing: norm.weight; nearest: norm.wait",
        "unknown: norm.wait; nearest: norm.weight",
    ]


def test_layers_that_differ_alike_share_a_line():
    tensors = {name.replace("fc", "linear"): value for name, value in fitting().items()}
    assert problems(tensors) == [
        "missing: layers.*.fc.weight (layers 0-3); nearest: layers.*.linear.weight",
        "unknown: layers.*.linear.weight (layers 0-3); nearest: layers.*.fc.weight",
    ]


def test_everything_wrong_is_said_at_once():
    tensors = fitting()
    del tensors["layers.2.fc.weight"]
    tensors |= {"layers.0.fc.weight": np.zeros((3, 2), np.float32), "layers.3.fc.weight": np.zeros((3, 2), np.float32)}
    tensors |= {"extra": np.zeros(1, np.float32), "norm.weight": np.zeros(3, np.int8)}
    found = problems(tensors)
    assert found[0].startswith("missing: layers.*.fc.weight (layers 2)")
    assert found[1].startswith("unknown: extra")
    assert found[2] == "wrong shape: layers.*.fc.weight (layers 0, 3) is [3, 2], must be [2, 3]"
    assert found[3] == "wrong dtype: norm.weight is int8, must be one of float32, bfloat16, float16"


def test_a_wrong_shape_points_to_an_unknown_tensor_of_the_right_one():
    tensors = fitting() | {"norm.weight": np.zeros(9, np.float32), "norm2.weight": np.zeros(3, np.float32)}
    assert "wrong shape: norm.weight is [9], must be [3]; nearest: norm2.weight" in problems(tensors)


def test_layers_of_one_stack_must_share_a_dtype():
    tensors = fitting()
    tensors["layers.1.fc.weight"] = tensors["layers.1.fc.weight"].astype(ml_dtypes.bfloat16)
    (line,) = problems(tensors)
    assert line.startswith("wrong dtype: layers.*.fc.weight is bfloat16 and float32")
