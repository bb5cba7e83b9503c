"""The choice of the next token."""

import dataclasses
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

from vlmem_jax.trees import State, axes


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


GREEDY, SAMPLED, LIMITED = 0, 1, 2
"""What the rows of a batch need at most: the most probable token, a draw, or a draw that top_k or top_p limits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice(State):
    """The sampling settings of each row as arrays, so that changing one compiles nothing."""

    temperature_B: Float[Array, "B"] = axes("batch")
    top_k_B: Int32[Array, "B"] = axes("batch")
    top_p_B: Float[Array, "B"] = axes("batch")
    key_B2: UInt32[Array, "B 2"] = axes("batch", None)
    """The numbers of a random key, as `jax.random.key_data` gives them."""
    banned_BV: Bool[Array, "B V"] = axes("batch", "vocab")
    stop_BN: Int32[Array, "B N"] = axes("batch", None)
    """Ids that end an answer; -1: none."""

    @classmethod
    def make(
        cls,
        config: SamplingConfig,
        rows: int,
        vocab: int,
        banned_ids: Collection[int],
        stop_ids: Collection[int],
        key_B2: np.ndarray | None = None,
        stops: int = 0,
    ) -> "Choice":
        """On the host, of rows with the same settings. Room is made for `stops` stop ids, or as many as there are.

        Row i of a batch draws with the key of `key_B2[i]`, else with seed + i, and so gives what it gives alone with
        that.
        """
        banned_V = np.zeros(vocab, bool)
        banned_V[list(banned_ids)] = True
        stop_N = np.full(max(stops, len(stop_ids)), -1, np.int32)
        stop_N[: len(stop_ids)] = list(stop_ids)
        if key_B2 is None:
            seeds_B = (config.seed + np.arange(rows, dtype=object)) % 2**32
            key_B2 = np.stack([np.zeros(rows), seeds_B], axis=1).astype(np.uint32)
        return cls(
            np.full(rows, config.temperature, np.float32),
            np.full(rows, config.top_k or vocab, np.int32),
            np.full(rows, config.top_p, np.float32),
            key_B2,
            np.repeat(banned_V[None], rows, axis=0),
            np.repeat(stop_N[None], rows, axis=0),
        )

    @property
    def keys_B(self) -> Array:
        return jax.random.wrap_key_data(self.key_B2, impl="threefry2x32")

    def stops(self, tokens_B: Int32[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a token ends its row."""
        return ((tokens_B[:, None] == self.stop_BN) & (tokens_B >= 0)[:, None]).any(-1)


def need(config: SamplingConfig) -> int:
    """What these settings need: see GREEDY."""
    if config.temperature == 0:
        return GREEDY
    return LIMITED if config.top_k or config.top_p < 1 else SAMPLED


def choose(
    logits_BV: Float[Array, "B V"],
    choice: Choice,
    index_B: Int32[Array, "B"],
    needed: Int32[Array, ""] | int,
    withheld_BV: Bool[Array, "B V"] | None = None,
) -> tuple[Int32[Array, "B"], Float[Array, "B"]]:
    """The next token of each row, never a banned one, and its log-probability in fp32.

    `index_B`: the token's place in its row, makes its draw. `needed`: the most that a row needs, see `need`; no row
    depends on what others need. The log-probability is that under the softmax of all scores but those of banned tokens,
    before temperature, top_k and top_p: what `train.loss.log_probs` computes of the row. Tokens that are withheld from
    a row for now are not chosen, either, but keep their share of that softmax.
    """
    allowed_BV = jnp.where(choice.banned_BV, -jnp.inf, logits_BV)
    drawn_BV = allowed_BV if withheld_BV is None else jnp.where(withheld_BV, -jnp.inf, allowed_BV)
    is_drawn_B, V = choice.temperature_B > 0, logits_BV.shape[-1]
    tempered_BV = drawn_BV / jnp.where(is_drawn_B, choice.temperature_B, 1)[:, None]

    def greedy(_):
        return drawn_BV.argmax(axis=-1).astype(jnp.int32)

    def sampled(x_BV):
        keys_B = jax.vmap(jax.random.fold_in)(choice.keys_B, index_B)
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, x_BV)
        return jnp.where(is_drawn_B, drawn_B.astype(jnp.int32), greedy(None))

    def limited(x_BV):  # sorting a whole vocabulary takes longer than all the rest
        is_limited_B1 = ((choice.top_k_B < V) | (choice.top_p_B < 1))[:, None]
        filtered_BV = filter_logits(x_BV, choice.top_k_B[:, None], choice.top_p_B[:, None])
        return sampled(jnp.where(is_limited_B1, filtered_BV, x_BV))

    tokens_B = jax.lax.switch(needed, (greedy, sampled, limited), tempered_BV)
    logp_BV = jax.nn.log_softmax(allowed_BV.astype(jnp.float32))
    return tokens_B, jnp.take_along_axis(logp_BV, tokens_B[:, None], axis=-1)[:, 0]


def filter_logits(
    logits_BV: Float[Array, "B V"], top_k: Int32[Array, "B 1"] | int, top_p: Float[Array, "B 1"] | float
) -> Float[Array, "B V"]:
    """-inf for all but the top_k most probable tokens, then for those beyond a total probability of top_p."""
    ranked_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    ranked_BV = jnp.where(jnp.arange(ranked_BV.shape[-1]) < top_k, ranked_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(ranked_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < top_p) & jnp.isfinite(ranked_BV)
    least_B1 = jnp.where(kept_BV, ranked_BV, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
