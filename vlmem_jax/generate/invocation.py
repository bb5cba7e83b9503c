"""When a memory that speaks is called for: by the model, by a rule, or as the caller says."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from vlmem_jax.memory import Speech
from vlmem_jax.processing import Tokenizer
from vlmem_jax.trees import State, axes

DELIMITERS = (".", ",", ";", ":", "!", "?")


class Invocation(NamedTuple):
    """A memory that stands in an answer."""

    kind: int
    """Its number among `Speech.kinds`: of the memory itself, which is not that of the call where types are reversed."""
    place: int
    """Its latent tokens stand before this token of the answer, which ends it."""
    latents: int
    """Number of latent tokens."""
    states_LD: np.ndarray | None = None
    """States that it was formed from, in the dtype of the model, where they are recorded."""


@dataclasses.dataclass(frozen=True)
class InvocationConfig:
    """Who calls for a memory while an answer is written.

    `learned`: the model, by choosing a token. `never`: nobody. `delimiter_random`: after a delimiter chance, with
    `probability`, of either kind; the model's own calls are banned. `always`: the same, after every delimiter.
    `first`: the same, once, right after the prompt.
    """

    mode: Literal["learned", "never", "delimiter_random", "always", "first"] = "learned"
    probability: float = 0.25
    anywhere: float = 0.0
    """Probability of delimiter_random after any other token."""
    max_invocations: int | None = None
    """In one answer; None: as the memory's config says, which is the most that there is room for."""
    disabled: tuple[str, ...] = ()
    """Kinds of memory: a call for one of them, if the model makes it, is a token like any other."""
    reverse_types: bool = False
    """A call for one kind is answered by the next, the last by the first."""

    def __post_init__(self):
        for key in ("probability", "anywhere"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be a probability, got {getattr(self, key)}")
        if self.max_invocations is not None and self.max_invocations < 0:
            raise ValueError(f"max_invocations must be at least 0, got {self.max_invocations}")

    def heeded(self, speech: Speech) -> tuple[bool, ...]:
        """Whether a call for each kind of memory is answered. Raises ValueError for a kind that there is not."""
        if unknown := set(self.disabled).difference(speech.kinds):
            raise ValueError(f"disabled must name kinds of the memory, {', '.join(speech.kinds)}; got {min(unknown)!r}")
        return tuple(self.mode != "never" and kind not in self.disabled for kind in speech.kinds)

    def banned_ids(self, speech: Speech) -> tuple[int, ...]:
        """Tokens that the model may not choose: those that end a memory, and, where others call, those that call."""
        return speech.end_ids + (() if self.mode == "learned" else speech.invoke_ids)

    def budget(self, speech: Speech) -> int:
        """Most calls in an answer. Raises ValueError if they are more than the memory makes room for."""
        wanted = speech.max_invocations if self.max_invocations is None else self.max_invocations
        if wanted > speech.max_invocations:
            raise ValueError(
                f"max_invocations must be at most that of the model, {speech.max_invocations}, got {wanted}; raise the "
                "memory's own max_invocations"
            )
        return wanted if any(self.heeded(speech)) else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule(State):
    """The settings of each row as arrays, so that changing one compiles nothing. Without a speech, K = 0."""

    after_prompt_B: Float[Array, "B"] = axes("batch")
    after_delimiter_B: Float[Array, "B"] = axes("batch")
    anywhere_B: Float[Array, "B"] = axes("batch")
    share_BK: Float[Array, "B K"] = axes("batch", None)
    """Of the kinds, in the calls of chance."""
    heeded_BK: Bool[Array, "B K"] = axes("batch", None)
    forced_BS: Int32[Array, "B S"] = axes("batch", None)
    """The first tokens of each row; -1: free."""
    limit_B: Int32[Array, "B"] = axes("batch")
    """Tokens that a row may choose."""

    @classmethod
    def make(
        cls,
        config: InvocationConfig,
        speech: Speech | None,
        limit: int,
        forced: Sequence[Sequence[int]],
        rows: int,
        places: int,
    ) -> "Rule":
        """On the host, of rows with the same settings but for `forced`, for which there are `places`. Raises ValueError
        if more rows are forced than there are, or more tokens than places."""
        if len(forced) > rows:
            raise ValueError(f"forced has tokens for {len(forced)} rows, but there are {rows}")
        longest = max(map(len, forced), default=0)
        if longest > places:
            raise ValueError(f"forced has {longest} tokens for a row, but there are places for {places}; raise forced")
        chance = {"delimiter_random": config.probability, "always": 1.0}.get(config.mode, 0.0)
        anywhere = config.anywhere if config.mode == "delimiter_random" else 0.0
        heeded_K = np.array(config.heeded(speech) if speech else (), bool)
        share_K = (heeded_K / max(heeded_K.sum(), 1)).astype(np.float32)
        forced_BS = np.full((rows, places), -1, np.int32)
        for row, ids in enumerate(forced):
            forced_BS[row, : len(ids)] = ids
        return cls(
            np.full(rows, 1.0 if config.mode == "first" else anywhere, np.float32),
            np.full(rows, chance, np.float32),
            np.full(rows, anywhere, np.float32),
            np.repeat(share_K[None], rows, axis=0),
            np.repeat(heeded_K[None], rows, axis=0),
            forced_BS,
            np.full(rows, limit, np.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Calls(State):
    """What each row has called for."""

    count_B: Int32[Array, "B"] = axes("batch")
    """Tokens so far that were chosen or forced."""
    left_B: Int32[Array, "B"] = axes("batch")
    """Calls that may still be made."""
    waiting_B: Bool[Array, "B"] = axes("batch")
    """Whether the row has made a call and waits for the answer."""
    last_B: Int32[Array, "B"] = axes("batch")
    """Its newest token; -1 before the first."""

    @classmethod
    def none(cls, rows: int, budget: int) -> "Calls":
        """On the host."""
        zeros = np.zeros(rows, np.int32)
        return cls(zeros, zeros + np.int32(budget), np.zeros(rows, bool), zeros - 1)

    def withheld(self, speech: Speech, vocab: int) -> Bool[Array, "B V"]:
        """Calls, from rows that have made all of theirs."""
        is_call_V = (jnp.arange(vocab)[:, None] == jnp.array(speech.invoke_ids)).any(-1)
        return is_call_V & (self.left_B <= 0)[:, None]

    def force(
        self,
        rule: Rule,
        delimiter_V: Bool[Array, "V"],
        speech: Speech | None,
        keys_B: Array,
        index_B: Int32[Array, "B"],
    ) -> Int32[Array, "B"]:
        """The token of each row where it is not the model's to choose, else -1; first the caller's, then chance.

        Keys and index as in `sampling.choose`.
        """
        tokens_B = self._by_chance(rule, delimiter_V, speech, keys_B, index_B) if speech else jnp.full_like(index_B, -1)
        S = rule.forced_BS.shape[1]
        if S == 0:
            return tokens_B
        place_B1 = jnp.minimum(self.count_B, S - 1)[:, None]
        given_B = jnp.where(self.count_B < S, jnp.take_along_axis(rule.forced_BS, place_B1, axis=1)[:, 0], -1)
        return jnp.where(given_B >= 0, given_B, tokens_B)

    def _by_chance(
        self, rule: Rule, delimiter_V: Array, speech: Speech, keys_B: Array, index_B: Array
    ) -> Int32[Array, "B"]:
        def draw(key, index):
            return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, index), 1), 2)

        draws_B2 = jax.vmap(draw)(keys_B, index_B)
        chance_B = jnp.where(delimiter_V[self.last_B], rule.after_delimiter_B, rule.anywhere_B)
        chance_B = jnp.where(self.last_B >= 0, chance_B, rule.after_prompt_B)
        kinds_B = (draws_B2[:, 1, None] >= jnp.cumsum(rule.share_BK, axis=1)[:, :-1]).sum(-1)
        called_B = (draws_B2[:, 0] < chance_B) & (self.left_B > 0) & rule.heeded_BK.any(-1)
        return jnp.where(called_B, jnp.array(speech.invoke_ids, jnp.int32)[kinds_B], -1)

    def take(
        self, rule: Rule, speech: Speech | None, tokens_B: Int32[Array, "B"], counts_B: Int32[Array, "B"]
    ) -> "Calls":
        """After the token of each row whose count is 1."""
        called_B = jnp.zeros_like(self.waiting_B)
        if speech:
            is_call_BK = (tokens_B[:, None] == jnp.array(speech.invoke_ids)) & rule.heeded_BK
            called_B = is_call_BK.any(-1) & (counts_B > 0) & (self.left_B > 0)
        return Calls(
            self.count_B + counts_B,
            self.left_B - called_B,
            self.waiting_B | called_B,
            jnp.where(counts_B > 0, tokens_B, self.last_B),
        )

    def answered(self, tokens_B: Int32[Array, "B"], answered_B: Bool[Array, "B"]) -> "Calls":
        """After memories that ended with these tokens."""
        return dataclasses.replace(
            self, waiting_B=self.waiting_B & ~answered_B, last_B=jnp.where(answered_B, tokens_B, self.last_B)
        )


def is_delimiter(delimiter_ids: Sequence[int], vocab: int) -> Bool[np.ndarray, "V"]:
    """Which tokens of the vocabulary end a phrase."""
    delimiter_V = np.zeros(vocab, bool)
    delimiter_V[list(delimiter_ids)] = True
    return delimiter_V


def delimiters(tokenizer: Tokenizer) -> list[int]:
    """Ids whose text ends a phrase: with one of DELIMITERS, spaces aside, or with a line break in it."""
    used = set(range(tokenizer.vocab_size)).difference(tokenizer.unused)
    texts = ((token, tokenizer.decode([token])) for token in sorted(used))
    return [token for token, text in texts if text.strip().endswith(DELIMITERS) or "\n" in text]
