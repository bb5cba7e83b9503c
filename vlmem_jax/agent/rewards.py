"""What the decisions of a trajectory are worth, by what came of them (MM-Mem, section 3.2, equation 10): answers that
are right, decisions that another model approves of, and captions that are short."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmem_jax.agent.gates import OPTIONS, FirstTokens, yes_or_no
from vlmem_jax.agent.manager import Action
from vlmem_jax.agent.nodes import Segment
from vlmem_jax.agent.segments import Span


@dataclasses.dataclass(frozen=True)
class Weights:
    """How much each part of a reward counts."""

    answer: float = 1.0
    supervisor: float = 0.5
    excess: float = 0.1
    divergence: float = 0.3


class Reward(NamedTuple):
    """The parts of a reward."""

    answer: float
    """How well a question was answered, from 0 to 1."""
    supervisor: float = 0.0
    """How likely the supervisor approves of a decision, on average; 0 without one."""
    excess: float = 0.0
    """How much longer captions are than they may be."""
    divergence: float = 0.0
    """Of the policy from its reference, in nats."""

    def total(self, weights: Weights = Weights()) -> float:
        """Of length and divergence, less is more."""
        good = weights.answer * self.answer + weights.supervisor * self.supervisor
        return good - weights.excess * self.excess - weights.divergence * self.divergence


def right(label: str, index: int) -> float:
    """1 for the letter of the option that is right, by its number, in any case."""
    return float(label.upper() == OPTIONS[index])


# --- captions ---------------------------------------------------------------------------------------------------------


def excess_tokens(tokens: Sequence[int], free: int = 128, most: float = 4.0) -> float:
    """By how many times `free` captions have more tokens than that, on average, each `most` times at most; so it stays
    as large as an answer that is wrong."""
    return _mean([min(most, max(0, count - free) / free) for count in tokens])


def excess_characters(characters: Sequence[int | None], free: int = 200) -> float:
    """By how many characters captions have more than `free`, on average, as in the release: there is no bound. None: an
    episode without caption, which has none."""
    return _mean([max(0, (count or 0) - free) for count in characters])


# --- a supervisor -----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What was done with a segment."""

    segment: int
    """Its number."""
    action: Action
    asked: bool = True
    """Whether there was something to decide."""


class Judged(NamedTuple):
    """What a supervisor is told of a decision: times and words, no frames."""

    episode: Span
    episode_caption: str
    """That of the segment which began it."""
    segment: Span
    segment_caption: str
    action: Action

    def key(self, video: str, supervisor: str, prompt: str) -> str:
        """Under which its answer can be kept: equal for the same words and times of the same video alone, shown to the
        same supervisor by the same prompt."""
        content = json.dumps([video, supervisor, prompt, self])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def judged(segments: Sequence[Segment], steps: Sequence[Step]) -> list[Judged]:
    """What each decision of a trajectory was about. A segment that is not there has no time and no caption."""
    known = {one.number: one for one in segments}
    episode, caption, found = Span(0.0, 0.0), "", []
    for step in steps:
        segment = known.get(step.segment, Segment(step.segment, 0.0, 0.0))
        span = Span(segment.start, segment.end)
        if step.asked:
            found.append(Judged(episode, caption, span, segment.caption, step.action))
        if step.action == "ADD_NEW":
            episode, caption = span, segment.caption
        elif step.action == "MERGE":
            episode = Span(episode.start, max(episode.end, span.end))
    return found


def approval(said: Sequence[FirstTokens]) -> float:
    """The probability that a supervisor says yes, on average; who says neither yes nor no does not approve."""
    return _mean([yes_or_no(tokens).probabilities["yes"] for tokens in said])


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
