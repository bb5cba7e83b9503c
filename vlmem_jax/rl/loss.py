"""The clipped policy objective of GRPO with its KL penalty, token by token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

Tokens = Float[Array, "*N"]

MOST_APART = 20.0
"""How far two log-probabilities of a token are taken to be apart, at most: e^20 is a finite number with room to add."""


def k3(logp: Tokens, ref_logp: Tokens) -> Tokens:
    """Estimate of KL(policy || reference) by a token it drew (k3, Schulman 2020); never negative, and bounded."""
    difference = _apart(ref_logp, logp)
    return jnp.exp(difference) - difference - 1


def exact_kl(logp_NK: Float[Array, "*N K"], ref_logp_NK: Float[Array, "*N K"]) -> Tokens:
    """KL(policy || reference) over K labels, whose probabilities add up to 1 in both."""
    return jnp.sum(jnp.exp(logp_NK) * _apart(logp_NK, ref_logp_NK), axis=-1)


def grpo_loss(
    logp: Tokens,
    old_logp: Tokens,
    ref_logp: Tokens,
    advantage: Tokens,
    weight: Tokens,
    beta: Tokens | float,
    clip: float = 0.2,
    clip_high: float | None = None,
    kl: Tokens | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over tokens of -weight x (min(r A, clip(r, 1 - clip, 1 + clip_high) A) - beta x k3), and sums to report.

    r = exp(logp - old_logp), `old_logp` that of the sampler. A weight of 1 / (its step's loss tokens) makes a
    mean per sequence, a weight of 1 one per token; tokens of weight 0 may hold anything. `clip_high` None: as `clip`.
    `kl` may stand in place of k3.
    The sums, weighted alike: `ratio`, `clipped` (tokens whose gradient the clip stops) and `kl`.
    """
    counts = weight > 0
    logp, old_logp, ref_logp = (jnp.where(counts, x, 0.0) for x in (logp, old_logp, ref_logp))
    high = clip if clip_high is None else clip_high
    ratio = jnp.exp(_apart(logp, old_logp))
    kl = k3(logp, ref_logp) if kl is None else jnp.where(counts, kl, 0.0)
    free, bounded = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + high) * advantage
    sums = {"ratio": ratio, "clipped": (bounded < free).astype(weight.dtype), "kl": kl}
    loss = -jnp.sum(weight * (jnp.minimum(free, bounded) - beta * kl))
    return loss, {name: jnp.sum(weight * value) for name, value in sums.items()}


def has_collapsed(
    logp_BT: Float[Array, "B T"],
    known_BT: Float[Array, "B T"],
    segments_BT: Int32[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> Bool[Array, "B T"]:
    """The tokens of segments in which the policy finds a token e^MOST_APART times more, or less, probable than was
    `known`, or has no number for it: what it says of them is no small change that could be learned from."""
    far_BT = ~(jnp.abs(logp_BT - known_BT) <= MOST_APART) & (weights_BT > 0)

    def of_row(far_T: Array, segments_T: Array) -> Array:
        return jnp.zeros(far_T.shape[0] + 1, bool).at[segments_T].max(far_T)[segments_T]

    return jax.vmap(of_row)(far_BT, segments_BT)


def _apart(one: Tokens, other: Tokens) -> Tokens:
    return jnp.clip(one - other, -MOST_APART, MOST_APART)
