"""An answer tells how it came about."""

import json

from vlmem_jax.agent.answers import Answer, Visit
from vlmem_jax.agent.gates import Belief
from vlmem_jax.agent.segments import Span

SURE, UNSURE = Belief({"A": 0.9, "B": 0.1}, 0.8), Belief({"A": 0.5, "B": 0.5}, 0.7)
TRACE = (
    Visit("L3", UNSURE, "", False, (1, 4), (Span(0, 20), Span(40, 60))),
    Visit("L2", SURE, "", False, (4,), (Span(40, 60),)),
    Visit("L1", UNSURE, "", False, (9,), (Span(50, 60),), 0.7),
)


def test_evidence_is_that_of_the_stage_that_is_believed():
    found = Answer("A", "A. red", "L2", SURE, True, TRACE, 7, 90)
    assert found.evidence == (Span(40, 60),)
    assert found._replace(in_memory=False).evidence == ()
    assert found._replace(stage="initial").evidence == ()


def test_a_record_can_be_written_down():
    record = Answer("A", "A. red", "L2", SURE, True, TRACE, 7, 90).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["final_answer"], record["text"], record["option_probs"]) == ("A", "A. red", SURE.probabilities)
    assert (record["evidence"], record["calls"], record["images"]) == ([[40, 60]], 7, 90)
    stages = record["retrieval_trace"]
    assert [one["predicted_option"] for one in stages] == ["A", "A", "A"]
    assert stages[0]["retrieved_l2_indices"] == [1, 4] and stages[0]["seconds"] == [[0, 20], [40, 60]]
    assert stages[1]["selected_l2_indices"] == [4] and stages[2]["selected_l1_indices"] == [9]
    assert stages[2]["enough"] == 0.7 and stages[1]["confidence"] == 0.9 and stages[1]["label_mass"] == 0.8


def test_an_answer_in_words_has_a_record_too():
    said = Visit("L3", Belief({}, 0.0), "two men", True, (0,), (Span(0, 5),), 0.9)
    record = Answer("", "two men", "L3", said.belief, True, (said,), 2, 0).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["final_answer"] == "two men" and record["retrieval_trace"][0]["predicted_option"] is None
