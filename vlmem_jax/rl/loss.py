"""The clipped policy objective of GRPO with its KL penalty, token by token."""

import jax.numpy as jnp
from jaxtyping import Array, Float

Tokens = Float[Array, "*N"]


def k3(logp: Tokens, ref_logp: Tokens) -> Tokens:
    """Estimate of KL(policy || reference) from a token the policy drew; never negative (k3, Schulman 2020)."""
    difference = ref_logp - logp
    return jnp.exp(difference) - difference - 1


def grpo_loss(
    logp: Tokens,
    old_logp: Tokens,
    ref_logp: Tokens,
    advantage: Tokens,
    weight: Tokens,
    beta: Tokens | float,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sum over tokens of -weight x (min(r A, clip(r, 1 - clip, 1 + clip_high) A) - beta x k3), and sums to report.

    r = exp(logp - old_logp), `old_logp` that of the sampler. A weight of 1 / (its trajectory's loss tokens) makes a
    mean per sequence, a weight of 1 one per token; tokens of weight 0 may hold anything. `clip_high` None: as `clip`.
    The sums, weighted alike: `ratio`, `clipped` (tokens whose gradient the clip stops) and `kl`.
    """
    counts = weight > 0
    logp, old_logp, ref_logp = (jnp.where(counts, x, 0.0) for x in (logp, old_logp, ref_logp))
    high = clip if clip_high is None else clip_high
    ratio, kl = jnp.exp(logp - old_logp), k3(logp, ref_logp)
    free, bounded = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + high) * advantage
    sums = {"ratio": ratio, "clipped": (bounded < free).astype(weight.dtype), "kl": kl}
    loss = -jnp.sum(weight * (jnp.minimum(free, bounded) - beta * kl))
    return loss, {name: jnp.sum(weight * value) for name, value in sums.items()}
