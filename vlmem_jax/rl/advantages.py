"""How much better each episode was than the others of its prompt, from their rewards alone."""

import numpy as np
from jaxtyping import Bool, Float


def group_advantages(
    scores_PG: Float[np.ndarray, "P G"], std: bool = True, eps: float = 1e-4, ddof: int = 0, min_std: float = 0.0
) -> np.ndarray:
    """Advantages [P, G] of the G episodes of each of P prompts: score - mean, over max(std + eps, min_std) where `std`.

    The standard deviation is that of the population (GRPO, arXiv 2402.03300; without `std`, arXiv 2503.20783), or, with
    `ddof` 1, that of the sample. Where all are equal, advantages are 0, whatever rounding makes of their mean, or
    eps = 0 of the quotient.
    """
    differs_P1 = varied(scores_PG)[:, None]
    centred_PG = np.where(differs_P1, scores_PG - scores_PG.mean(axis=-1, keepdims=True), 0.0)
    spread_P1 = np.maximum(scores_PG.std(axis=-1, keepdims=True, ddof=ddof) + eps, min_std)
    return centred_PG / np.where(differs_P1, spread_P1, 1.0) if std else centred_PG


def varied(scores_PG: Float[np.ndarray, "P G"]) -> Bool[np.ndarray, "P"]:
    """Which groups have episodes of unequal score; the others teach nothing."""
    return np.ptp(scores_PG, axis=-1) > 0
