"""The choice of the next token."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen and when to stop."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    """0: always the most probable token."""
    top_k: int = 0
    """Choose among the k most probable tokens; 0: all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that together reach this probability."""
    seed: int = 0

    def __post_init__(self):
        for key, valid, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0 (0: no limit)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not valid:
                raise ValueError(f"{key} must be {rule}, got {getattr(self, key)}")


class Choice(NamedTuple):
    """The sampling settings as arrays, so that changing one compiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int32[Array, ""]
    top_p: Float[Array, ""]
    keys_B: Array
    """A random key a row."""
    banned_V: Bool[Array, "V"]
    stop_V: Bool[Array, "V"]

    @classmethod
    def make(cls, config: SamplingConfig, rows: int, vocab: int, banned_ids, stop_ids, keys_B=None) -> "Choice":
        """On the host, but for keys.

        Row i of a batch draws with `keys_B[i]`, else with seed + i, and so gives what it gives alone with that.
        """
        banned_V, stop_V = np.zeros(vocab, bool), np.zeros(vocab, bool)
        banned_V[list(banned_ids)] = True
        stop_V[list(stop_ids)] = True
        if keys_B is None:
            keys_B = jax.vmap(jax.random.key)(jnp.arange(rows, dtype=jnp.uint32) + np.uint32(config.seed % 2**32))
        limits = np.float32(config.temperature), np.int32(config.top_k or vocab), np.float32(config.top_p)
        return cls(*limits, keys_B, banned_V, stop_V)


def choose(
    logits_BV: Float[Array, "B V"],
    choice: Choice,
    index_B: Int32[Array, "B"],
    greedy: bool,
    withheld_BV: Bool[Array, "B V"] | None = None,
) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """The next token of each row, never a banned one, and its log-probability in fp32.

    `index_B`: the token's place in its row, makes its draw. The log-probability is that under the softmax of all scores
    but those of banned tokens, before temperature, top_k and top_p: what `train.loss.log_probs` computes of the row.
    Tokens that are withheld from a row for now are not chosen, either, but keep their share of that softmax.
    """
    allowed_BV = jnp.where(choice.banned_V, -jnp.inf, logits_BV)
    drawn_BV = allowed_BV if withheld_BV is None else jnp.where(withheld_BV, -jnp.inf, allowed_BV)
    if greedy:
        tokens_B = drawn_BV.argmax(axis=-1)
    else:
        limited = (choice.top_k < logits_BV.shape[-1]) | (choice.top_p < 1)
        tempered_BV = jax.lax.cond(  # sorting a whole vocabulary takes longer than all the rest
            limited,
            lambda x_BV: filter_logits(x_BV, choice.top_k, choice.top_p),
            lambda x_BV: x_BV,
            drawn_BV / choice.temperature,
        )
        keys_B = jax.vmap(jax.random.fold_in)(choice.keys_B, index_B)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, tempered_BV)
    logp_BV = jax.nn.log_softmax(allowed_BV.astype(jnp.float32))
    return tokens_B.astype(jnp.int32), jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=-1)[:, 0]


def filter_logits(
    logits_BV: Float[Array, "B V"], top_k: Int32[Array, ""] | int, top_p: Float[Array, ""] | float
) -> Float[Array, "B V"]:
    """-inf for all but the top_k most probable tokens, then for those beyond a total probability of top_p."""
    ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranked_BV = jnp.where(jnp.arange(ranked_BV.shape[-1]) < top_k, ranked_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p) & jnp.isfinite(ranked_BV)
    least_B1 = jnp.where(kept_BV, ranked_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
