"""VSI-Bench's scores against those of its own scorer."""

import json

import numpy as np
import pytest

from vlmem_jax.scoring import vsi


@pytest.fixture(scope="module")
def data(golden):
    return json.loads((golden / "vlm2" / "vsi_scoring.json").read_text())


def scored(example):
    numerical = example["question_type"] in vsi.NUMERICAL
    return (vsi.number if numerical else vsi.choice)(example["prediction"], example["ground_truth"])


def test_each_answer_is_read_and_scored_as_there(data):
    np.testing.assert_array_equal(vsi.THRESHOLDS, data["thresholds"])
    for example in data["examples"]:
        assert vsi.first_word(example["prediction"]) == example["parsed"], example
        assert scored(example) == pytest.approx(example["score"], abs=1e-9), example


def test_the_table_is_that_of_the_benchmark(data):
    kinds = {}
    for example in data["examples"]:
        kinds.setdefault(example["question_type"], []).append(scored(example))
    found, wanted = vsi.benchmark({kind: np.mean(scores) for kind, scores in kinds.items()}), data["aggregate"]
    for name, value in (
        wanted["per_task"] | {k: wanted[k] for k in ("overall", "numerical", "multiple_choice")}
    ).items():
        assert 100 * found[name] == pytest.approx(value, abs=1e-9), name
