"""The reward of learning when to invoke which memory (VisMem, arXiv 2511.11007, stage II).

Arrays hold the G trajectories of a prompt on their last axis.
"""

import numpy as np
from jaxtyping import Bool, Float

Scores = Float[np.ndarray, "*P G"]
Invoked = Bool[np.ndarray, "*P G"]
"""Which trajectories invoked a memory; the others are not penalised."""


def type_penalty(score: Scores, reversed_score: Scores, invoked: Invoked) -> Scores:
    """What the trajectory would have gained had its invocations asked for the other kind of memory."""
    return np.where(invoked, np.maximum(reversed_score - score, 0.0), 0.0)


def negative_penalty(score: Scores, invoked: Invoked) -> Scores:
    """By how much the trajectory, with its invocations, stayed below the mean of its group."""
    return np.where(invoked, np.maximum(score.mean(axis=-1, keepdims=True) - score, 0.0), 0.0)


def invocation_reward(
    score: Scores,
    base_score: Float[np.ndarray, "*P #G"],
    reversed_score: Scores,
    invoked: Invoked,
    alpha: float = 0.3,
) -> Scores:
    """score - base_score - alpha x (both penalties); `base_score` is without memory, one a group or each."""
    penalties = type_penalty(score, reversed_score, invoked) + negative_penalty(score, invoked)
    return score - base_score - alpha * penalties
