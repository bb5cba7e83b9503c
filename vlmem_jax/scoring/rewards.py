"""What an answer is worth: plain functions of a model's output and its prompt, named in the config.

See `answers` for what is found in an output; `exact` and `substr` compare the whole output, as released.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from vlmem_jax.config import ConfigError
from vlmem_jax.scoring import answers, maths, scenes, vsi


class Asked(Protocol):
    """What is known of a prompt: `data.Prompt` is one."""

    name: str
    """For error messages."""
    answers: tuple[str, ...]
    """Accepted ones."""
    answer_type: str
    """text, choice or number."""
    choices: tuple[str, ...]
    """Of a question with choices."""


Reward = Callable[[str, Asked], float]
"""`reward(output, prompt)`: what the text that a model wrote is worth."""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One term of the score."""

    name: str
    """exact, substr, answer (text, choice or number, as the prompt says), text, choice, number, math, regex, format,
    vsi (as VSI-Bench scores: the letter of a choice, or how near a number is), em (as ScanQA and SQA3D do),
    or MODULE:FUNCTION of your own, called with the output and the `data.Prompt`."""
    weight: float = 1.0
    pattern: str = ""
    """Of regex: what the output must hold; empty: the prompt's answers are the expressions."""


# --- rewards by name --------------------------------------------------------------------------------------------------


def _best(compare: Callable[[str, str], float], output: str, prompt: Asked) -> float:
    return max((float(compare(output, reference)) for reference in prompt.answers), default=0.0)


def _answer(kind: str, output: str, prompt: Asked) -> float:
    """The answer in an output, compared as `kind` of answer."""
    comparisons = {
        "text": answers.text,
        "number": answers.number,
        "choice": lambda output, reference: answers.choice(output, reference, prompt.choices),
    }
    return _best(comparisons[kind], output, prompt)


def _format(output: str, prompt: Asked) -> float:
    """1 if the output has an <answer>...</answer> or \\boxed{...}."""
    return float(bool(re.search(r"<answer>.*?</answer>", output, re.DOTALL)) or answers.last_boxed(output) is not None)


def _regex(pattern: str) -> Reward:
    if pattern:
        expression = re.compile(pattern)
        return lambda output, prompt: float(bool(expression.search(output)))
    return lambda output, prompt: _best(lambda o, r: float(bool(re.search(r, o))), output, prompt)


BUILT_IN: dict[str, Reward] = {
    "exact": lambda output, prompt: _best(answers.exact, output, prompt),
    "substr": lambda output, prompt: _best(answers.substr, output, prompt),
    "answer": lambda output, prompt: _answer(prompt.answer_type, output, prompt),
    "text": lambda output, prompt: _answer("text", output, prompt),
    "choice": lambda output, prompt: _answer("choice", output, prompt),
    "number": lambda output, prompt: _answer("number", output, prompt),
    "math": lambda output, prompt: _best(maths.equal, output, prompt),
    "format": _format,
    "vsi": lambda output, prompt: _best(vsi.choice if prompt.answer_type == "choice" else vsi.number, output, prompt),
    "em": lambda output, prompt: _best(scenes.exact_match, output, prompt),
}


class RewardError(ValueError):
    """A reward raised, or gave no finite number."""


class Rewards:
    """The score of an output: the weighted sum of rewards. Safe to call from several threads if they are."""

    def __init__(self, configs: Sequence[RewardConfig], where: str = "rewards"):
        """Raises ConfigError, naming the key below `where`, for what is no reward."""
        if not configs:
            raise ConfigError(f"{where} must have at least one element; got none")
        self.configs = configs
        self._functions = [find(config, f"{where}.{n}") for n, config in enumerate(configs)]
        self.needs_answer = any(
            ":" not in config.name and config.name != "format" and not config.pattern for config in configs
        )
        """Whether prompts without an answer are of no use."""

    def check(self, prompt: Asked) -> None:
        """Raises ValueError, naming the prompt, where its answers are not of a kind that these rewards can judge."""
        for config in self.configs:
            kind = prompt.answer_type if config.name == "answer" else config.name
            if kind == "judge":
                raise ValueError(
                    f"answer_type judge needs a judge: a reward MODULE:FUNCTION in place of {config.name} "
                    f"(sample {prompt.name})"
                )
            names = [answers.option(text, prompt.choices) for text in prompt.answers] if prompt.choices else []
            if kind == "choice" and names and not any(names):
                raise ValueError(
                    f"an answer of answer_type choice must be one of the {len(prompt.choices)} choices, got "
                    f"{prompt.answers[0]!r:.100} (sample {prompt.name})"
                )
            if kind == "number" and (wrong := [text for text in prompt.answers if answers.parse_number(text) is None]):
                raise ValueError(
                    f"an answer of answer_type number must be one, got {wrong[0]!r} (sample {prompt.name})"
                )

    def score(self, output: str, prompt: Asked) -> float:
        """The weighted sum. Raises RewardError, which names the sample and the function."""
        total = 0.0
        for config, function in zip(self.configs, self._functions, strict=True):
            try:
                value = float(function(output, prompt))
            except Exception as error:  # whatever a function of one's own may raise
                raise RewardError(
                    f"reward {config.name} raised {type(error).__name__}: {error} (sample {prompt.name}, output "
                    f"{output!r:.200}); {ERROR_HINT}"
                ) from error
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {config.name} must give a finite number, got {value} (sample {prompt.name}, output "
                    f"{output!r:.200}); {ERROR_HINT}"
                )
            total += config.weight * value
        return total


ERROR_HINT = "stages.N.task.on_reward_error=zero scores such outputs 0"


def find(config: RewardConfig, where: str = "reward") -> Reward:
    """The function that `config.name` stands for. Raises ConfigError if there is none."""
    if not math.isfinite(config.weight):
        raise ConfigError(f"{where}.weight must be a finite number, got {config.weight}")
    if config.pattern and config.name != "regex":
        raise ConfigError(f"{where}.pattern is for the reward regex, got it for {config.name}")
    if config.name == "regex":
        try:
            return _regex(config.pattern)
        except re.error as error:
            raise ConfigError(
                f"{where}.pattern must be a regular expression, got {config.pattern!r}: {error}"
            ) from error
    if ":" in config.name:
        return imported(config.name, f"{where}.name")
    if config.name not in BUILT_IN:
        names = ", ".join([*BUILT_IN, "regex"])
        raise ConfigError(f"{where}.name must be one of {names}, or MODULE:FUNCTION; got {config.name!r}")
    return BUILT_IN[config.name]


def imported(name: str, where: str) -> Callable:
    """The function MODULE:FUNCTION. Raises ConfigError naming `where` if it cannot be imported."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where} {name!r} must be MODULE:FUNCTION that can be imported; {error}") from error
    if not callable(found):
        raise ConfigError(f"{where} {name!r} must be a function, got {type(found).__name__}")
    return found
