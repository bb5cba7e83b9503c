"""How sure an answer is: probabilities of labels, their entropy, and when to stop looking further.

MM-Mem, section 3.3. Two readings of a first token are kept apart: `strict`, which counts tokens that are a label, and
that of the release, in which any token counts for its first letter ("Answer" for A) and no label at all is certainty.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from vlmem_jax.scoring.videos import letter

FirstTokens = Sequence[tuple[str, float] | list] | None
"""Texts of the likeliest first tokens with their log-probabilities; None: none are known."""

FLOOR = -100.0
"""Log-probabilities that mean nothing are not above it."""

OPTIONS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

GAMMA = 0.72
"""Entropy of four options, in nats, up to which an answer is sure (MM-Mem, table 5)."""


class Belief(NamedTuple):
    """Probabilities of labels."""

    probabilities: dict[str, float]
    mass: float
    """What all labels had together before."""

    @property
    def label(self) -> str:
        """The likeliest; of several, the first."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def entropy(self) -> float:
        """In nats."""
        return entropy(self.probabilities)


def entropy(probabilities: Mapping[str, float]) -> float:
    """Of a distribution, in nats; of none, 0."""
    return -sum(p * math.log(p) for p in probabilities.values() if p > 0)


# --- reading a first token --------------------------------------------------------------------------------------------


def with_drawn(drawn: tuple[str, float], likeliest: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """First tokens as servers give them: the one that was drawn may be among the likeliest, and counts once."""
    return list(dict([drawn, *likeliest]).items())


def strict(tokens: FirstTokens, labels: Sequence[str], exact_case: bool = True) -> Belief:
    """What a first token says: it counts if it is a label, but for spaces and signs around it. Without any, all labels
    are alike."""
    fold: Callable[[str], str] = str if exact_case else str.upper
    known = {fold(label): label for label in labels}
    belief = _counted(tokens, labels, lambda token: known.get(fold(_bare(token)), ""))
    return belief if belief.mass else Belief(dict.fromkeys(labels, 1 / len(labels)), 0.0)


def by_first_letter(tokens: FirstTokens, labels: Sequence[str]) -> Belief:
    """As the release reads options. Without any, all are 0."""
    return _counted(tokens, labels, letter)


def yes_or_no(tokens: FirstTokens) -> Belief:
    """As the release reads the answer to a question of yes or no. Without either, both are 0."""
    return _counted(tokens, ("yes", "no"), lambda token: _bare(token).lower())


def _bare(token: object) -> str:
    return re.sub(r"^[\W\d_]+|[\W\d_]+$", "", token) if isinstance(token, str) else ""


def _counted(tokens: FirstTokens, labels: Sequence[str], label_of: Callable[[str], str]) -> Belief:
    found = dict.fromkeys(labels, 0.0)
    for token, logp in tokens or ():
        if logp > FLOOR and (label := label_of(token)) in found:
            found[label] += math.exp(logp)
    mass = sum(found.values())
    return Belief({label: p / mass for label, p in found.items()} if mass else found, mass)


# --- stopping ---------------------------------------------------------------------------------------------------------


def bound(options: int, gamma: float = GAMMA, scaled: bool = True) -> float:
    """The entropy up to which an answer among so many options is sure; `scaled`: by what it can be, of four options."""
    return gamma * math.log(options) / math.log(4) if scaled else gamma


Reason = Literal["entropy", "plateau", "exhausted"]


def stop(
    entropies: Sequence[float], bound: float, step: float = 0.0, patience: int | None = None
) -> tuple[int, Reason]:
    """After which stage to stop, and why: it is sure, or has become surer by less than `step` in `patience` stages one
    after the other (None: that is no reason), or it was the last."""
    flat = 0
    for n, found in enumerate(entropies):
        if found <= bound:
            return n, "entropy"
        flat = flat + 1 if n and entropies[n - 1] - found < step else 0
        if patience is not None and flat >= patience:
            return n, "plateau"
    return len(entropies) - 1, "exhausted"


# --- options ----------------------------------------------------------------------------------------------------------


def with_letters(options: Sequence[str], release: bool = False) -> list[str]:
    """Options behind their letters, which may stand there already. In the release an option that begins with its letter
    as a word ("A man walks") is taken for one that has it. Raises ValueError for more options than letters."""
    if len(options) > len(OPTIONS):
        raise ValueError(f"a question can have {len(OPTIONS)} options, got {len(options)}")
    texts = [option.strip() for option in options]
    if release:
        return [
            text if text.startswith((f"{letter}.", f"{letter} ")) else f"{letter}. {text}"
            for letter, text in zip(OPTIONS, texts, strict=False)
        ]
    bare = [re.fullmatch(rf"\(?{letter}[.):]\s*(.*)", text, re.S) for letter, text in zip(OPTIONS, texts, strict=False)]
    if all(bare):
        texts = [found[1] for found in bare]
    return [f"{letter}. {text}" for letter, text in zip(OPTIONS, texts, strict=False)]
