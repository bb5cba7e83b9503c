import math

import pytest

from vlmem_jax.config import ConfigError
from vlmem_jax.data import Prompt
from vlmem_jax.scoring import maths
from vlmem_jax.scoring.rewards import RewardConfig, RewardError, Rewards


def prompt(*answers, **fields):
    return Prompt(name="prompts.jsonl:3", id="2", parts=("?",), answers=answers, **fields)


def score(output, prompt, *names, **fields):
    return Rewards([RewardConfig(name, **fields) for name in names]).score(output, prompt)


def test_an_answer_is_compared_as_its_prompt_says():
    assert score("Answer: 12.50", prompt("12.5", answer_type="number"), "answer") == 1
    assert score("Answer: 12.50", prompt("12.5"), "answer") == 0
    assert score("Answer: (b)", prompt("B", answer_type="choice"), "answer") == 1
    assert score("It is\nthe  Cat", prompt("dog", "THE CAT"), "answer") == 1, "any of the accepted answers"
    assert score("Answer: B", prompt("B"), "exact") == 0 and score("Answer: B", prompt("B"), "substr") == 1


def test_patterns_come_from_the_config_or_the_prompt():
    assert score("I count 12", prompt(), "regex", pattern=r"\d\d$") == 1
    assert score("I count 12.", prompt(), "regex", pattern=r"\d\d$") == 0
    assert score("colour", prompt("colou?r"), "regex") == 1 and score("coler", prompt("colou?r"), "regex") == 0


def test_terms_add_up_by_weight():
    both = Rewards([RewardConfig("answer"), RewardConfig("format", 0.1)])
    assert both.score("<answer>a</answer>", prompt("a")) == 1.1
    assert both.score("<answer>b</answer>", prompt("a")) == 0.1
    assert both.score("a", prompt("a")) == 1.0


def test_a_function_of_ones_own_sees_output_and_prompt():
    own = Rewards([RewardConfig("tests.rl.own:length")])
    assert own.score("abc", prompt()) == 4 and not own.needs_answer
    for output, what in (("raise", "raised KeyError: 'no such thing'"), ("nan", "must give a finite number, got nan")):
        with pytest.raises(RewardError, match=what) as error:
            own.score(output, prompt())
        assert "length" in str(error.value) and "(sample prompts.jsonl:3" in str(error.value)
    with pytest.raises(RewardError, match="raised TypeError"):
        own.score("none", prompt())


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(name="exakt"), "rewards.0.name must be one of exact, .*got 'exakt'"),
        (dict(name="no.such.module:f"), "rewards.0.name 'no.such.module:f' must be MODULE:FUNCTION"),
        (dict(name="math:nothing"), "must be MODULE:FUNCTION"),
        (dict(name="math:pi"), "must be a function, got float"),
        (dict(name="regex", pattern="("), "pattern must be a regular expression"),
        (dict(name="exact", pattern="a"), "pattern is for the reward regex"),
        (dict(name="exact", weight=math.inf), "weight must be a finite number"),
    ],
)
def test_what_is_no_reward_is_said(config, message):
    with pytest.raises(ConfigError, match=message):
        Rewards([RewardConfig(**config)])


def test_answers_that_cannot_be_judged_are_said():
    answers = Rewards([RewardConfig("answer")])
    with pytest.raises(ValueError, match=r"needs a judge.*sample prompts.jsonl:3"):
        answers.check(prompt("a", answer_type="judge"))
    with pytest.raises(ValueError, match=r"must be one, got 'many' \(sample prompts.jsonl:3"):
        answers.check(prompt("many", answer_type="number"))
    answers.check(prompt("3 km", answer_type="number"))
    with pytest.raises(ValueError, match=r"must be one of the 2 choices, got 'E' \(sample prompts.jsonl:3"):
        answers.check(prompt("E", answer_type="choice", choices=("cat", "dog")))
    answers.check(prompt("dog", answer_type="choice", choices=("cat", "dog")))
    assert answers.needs_answer and not Rewards([RewardConfig("regex", pattern="a")]).needs_answer
    with pytest.raises(ConfigError, match="at least one"):
        Rewards([])


@pytest.mark.parametrize(
    "output, answer, same",
    [
        (r"The area is $\frac{1}{2}$.", "0.5", 1),
        (r"\boxed{[1, 2)}", "[1,2)", 1),
        (r"so the set is $\{1,2\}$", r"\{2,1\}", 1),
        ("$x^2+2x+1$", "(x+1)^2", 1),
        ("4", "3", 0),
        ("no formula at all", "3", 0),
        ("$9^{9^{9^{9^9}}}$", "3", 0),
        ("$((((", "3", 0),
    ],
)
def test_formulas_are_compared_by_what_they_are(output, answer, same, monkeypatch):
    monkeypatch.setattr(maths, "SECONDS", 20.0 if same else 2.0)
    assert score(output, prompt(answer), "math") == same
