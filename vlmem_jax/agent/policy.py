"""The manager's policy: a distribution over actions from the log-probabilities of their labels, all in float64."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64


def policy(scores_A: Sequence[float] | np.ndarray, temperature: float = 1.0) -> Float64[np.ndarray, "A"]:
    """Probabilities of actions from the log-probability of each label: the softmax of the scores, divided by the
    temperature, at which actions are drawn. Raises ValueError for scores that are not finite."""
    scaled_A = np.asarray(scores_A, np.float64) / temperature
    if not np.isfinite(scaled_A).all():
        raise ValueError(f"scores of actions must be finite, got {list(scores_A)}")
    p_A = np.exp(scaled_A - scaled_A.max())
    return p_A / p_A.sum()


def divergence(p_A: np.ndarray, reference_A: np.ndarray) -> float:
    """KL(p || reference), in nats."""
    used_A = p_A > 0
    return float((p_A[used_A] * np.log(p_A[used_A] / reference_A[used_A])).sum())
