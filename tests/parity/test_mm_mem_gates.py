"""How sure an answer is: as in MM-Mem's release, and as the paper has it."""

import json
import math

import pytest

from vlmem_jax.agent import gates
from vlmem_jax.scoring.videos import letter


@pytest.fixture(scope="module")
def labels(golden):
    return json.loads((golden / "mm_mem/labels_entropy.json").read_text())


@pytest.fixture(scope="module")
def formula(golden):
    return json.loads((golden / "mm_mem/formula.json").read_text())


def close(found, wanted):
    assert found == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_tokens_that_count_for_a_label(labels):
    for case in labels["normalisers"]:
        assert letter(case["token"]) == case["option"]
        found = gates.yes_or_no([[case["token"], 0.0]]).probabilities
        assert [label for label, p in found.items() if p] == ([case["binary"]] if case["binary"] else [])


def test_probabilities_of_the_release(labels):
    for case in labels["label_cases"]:
        belief = gates.by_first_letter(case["logprobs"], case["labels"])
        close(belief.probabilities, case["option_probs"])
        close(gates.yes_or_no(case["logprobs"]).probabilities, case["yes_no"])
        close(belief.entropy, case["entropy"])
        for threshold, (is_confident, entropy, prediction) in case["is_confident"].items():
            assert (belief.entropy < float(threshold), belief.label) == (is_confident, prediction)
            close(belief.entropy, entropy)


def test_entropies(labels):
    for case in labels["entropy_cases"]:
        close(gates.entropy(case["probs"]), case["entropy"])
        close(math.log(max(len(case["probs"]), 1)), case.get("max_entropy", 0.0))


def test_options(labels):
    for case in labels["format_options"]:
        assert "\n".join(gates.with_letters(case["options"], release=True)) == case["formatted"]
        assert list(gates.OPTIONS[: len(case["options"])]) == case["labels"]


def test_exact_labels(formula):
    for case in formula["strict_labels"]:
        belief = gates.strict(case["logprobs"], case["labels"], exact_case=False)
        close(belief.probabilities, case["probs"])
        close([belief.mass, belief.entropy], [case["label_mass"], case["entropy"]])
        close(belief.entropy / math.log(len(case["labels"])), case["normalised_entropy"])


def test_stopping(formula):
    for case in formula["stopping"]:
        bound = gates.bound(case["n_options"], case["gamma"], scaled=False)
        found = gates.stop(case["entropies"], bound, case["epsilon"], case["patience"])
        assert found == (case["stop_index"], case["reason"])
