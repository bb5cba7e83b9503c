import json

import numpy as np
import pytest

from vlmem_jax.config import load
from vlmem_jax.demo.steps import (
    CELLS,
    END,
    KEPT,
    MEMORY,
    PAUSE,
    StepsConfig,
    ask,
    final,
    hesitating,
    token_ids,
    write_steps,
)
from vlmem_jax.demo.vismem import ANSWER_TOKENS, VisMemRecipe, base_experiment
from vlmem_jax.families import resolve
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.models import VLM
from vlmem_jax.processing.images import image_size
from vlmem_jax.scoring.answers import extract_answer
from vlmem_jax.train.config import experiment
from vlmem_jax.train.next_token import experiment_processor

DIGITS_RC = np.arange(16).reshape(4, 4) % 10
SMALL = StepsConfig(pictures=6, reading_lines=8, steps_lines=8, prompts=40, heldout=12)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "dataset"
    write_steps(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def processor(steps):
    config = experiment(base_experiment(steps, VisMemRecipe.scaled(0.01)))
    return experiment_processor(config, VLM(config.model))


def lines(steps, name):
    return [json.loads(line) for line in (steps / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "axis", "answer"),
    [
        ("sum", "row", "4; 5 makes 9; 6 makes 15; 7 makes 22. Answer: 22"),
        ("sum", "column", "1; 5 makes 6; 9 makes 15; 3 makes 18. Answer: 18"),
        ("largest", "row", "4; 5; 6; 7. Answer: 7"),
        ("largest", "column", "1; 5; 9; 3. Answer: 9"),
    ],
)
def test_the_steps_lead_to_the_answer(kind, axis, answer):
    question = ask(kind, DIGITS_RC, axis, 1)
    assert question.answer == answer and f"{axis} 2?" in question.text
    assert final(answer) == extract_answer(answer)


def test_an_answer_comes_back_from_the_tokenizer_with_its_delimiters(processor):
    tokenizer, answer = processor.tokenizer, ask("sum", DIGITS_RC, "row", 1).answer
    ids = tokenizer.encode(answer)
    assert "<unk>" not in tokenizer.decode(ids, skip_special=False)
    assert tokenizer.decode(ids).replace(" ;", ";").replace(" .", ".") == answer
    assert set(delimiters(tokenizer)) == set(token_ids(";", END, "Answer:"))
    assert [tokenizer.id(token) for token in KEPT] == list(token_ids(*KEPT))
    assert tokenizer.decode(token_ids(*MEMORY)) == ""


def test_there_is_room_for_the_longest_answer_and_calls_for_memories(processor):
    longest = max(len(processor.tokenizer.encode(ask(kind, DIGITS_RC, "row", 2).answer)) for kind in ("sum", "largest"))
    calls = resolve({"preset": "digits_qwen2_5_vl", "memory": "vismem"}).memory.max_invocations
    assert longest + 1 + calls <= ANSWER_TOKENS


@pytest.mark.parametrize("name", ["reading", "steps"])
def test_a_conversation_nearly_fills_a_row_and_never_more(steps, processor, name):
    tokens = []
    for line in lines(steps, name):
        plan = processor.plan(line["conversations"], [image_size(steps / path) for path in line["image"]])
        tokens.append(plan.tokens)
    assert max(tokens) <= SMALL.tokens and np.mean(tokens) > 0.85 * SMALL.tokens


def test_prompts_hold_the_last_step_alone(steps):
    for name, where in (("prompts", "images/train"), ("heldout", "images/heldout")):
        found = lines(steps, name)
        assert {line["source"] for line in found} == {"sum", "largest"}
        for line in found:
            name, shown, _, question = line["prompt"]
            assert name == "image 1: " and shown["image"].startswith(where)
            assert line["answer"] == final(line["steps"]) and "Answer:" not in question


def test_memories_are_warmed_up_on_the_steps_themselves(steps):
    for line in lines(steps, "worked"):
        assert line["answer"] == line["steps"] and PAUSE not in line["answer"]


def test_pauses_leave_the_steps_as_they_are():
    question = ask("sum", DIGITS_RC, "row", 1)
    paused = [hesitating(np.random.default_rng(seed), question) for seed in range(40)]
    assert all(one.answer.replace(f"{PAUSE} ", "") == question.answer for one in paused)
    assert all(one.tokens - question.tokens == one.answer.count(PAUSE) for one in paused)
    assert len({one.answer for one in paused}) > 10 and any(f"{PAUSE} Answer:" in one.answer for one in paused)


def test_the_tiny_config_knows_the_tokens_of_the_memory():
    model = load("configs/tiny/vismem.py").model
    assert (model.memory.token_ids, model.memory.start_id) == (token_ids(*MEMORY), *token_ids(PAUSE))


def test_the_largest_sum_is_a_token():
    assert final(ask("sum", np.full((CELLS, CELLS), 9), "row", 0).answer) in KEPT
