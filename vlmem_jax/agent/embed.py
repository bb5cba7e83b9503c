"""Vectors of texts, and how much texts bear on a question: by words alone, without a model, or by encoders of text.

A vector depends on its text alone, never on the memory that it is kept in: what was stored stays comparable while a
memory grows, a stream gives what the whole video gives, and memories are searched together. How rare a word is counts
where the texts of the memory are at hand, in `LexicalReranker`.
"""

import functools
import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from vlmem_jax.hub.text_encoder import TextModel


class Mark(NamedTuple):
    """What tells an embedder's vectors from those of others. A store keeps it, as `_asdict()` gives it, with them."""

    name: str
    dimension: int
    digest: str
    """Of all that vectors depend on, such as weights."""

    def check(self, kept: Mapping[str, Any], where: str) -> None:
        """Raises ValueError if the vectors of `where`, which were kept with the mark `kept`, are of another embedder;
        the same one may have another name."""
        if (kept.get("dimension"), kept.get("digest")) != (self.dimension, self.digest):
            raise ValueError(
                f"{where} holds vectors of the embedder {_said(kept)}, which cannot be compared with those of "
                f"{_said(self._asdict())}; take that embedder, or build the memory again"
            )


def _said(mark: Mapping[str, Any]) -> str:
    return f"{mark.get('name')} ({mark.get('dimension')} numbers, {str(mark.get('digest'))[:8]})"


class Embedder(Protocol):
    """Gives texts vectors that are alike where texts are."""

    mark: Mark

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Of length 1; 0 for a text that says nothing."""


class Reranker(Protocol):
    """Says how much each text bears on a question; only the order of the numbers means something."""

    name: str

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]: ...


# --- by words ---------------------------------------------------------------------------------------------------------

DIMENSION = 1024
PAIR_WEIGHT = 0.5
"""Of two neighbouring words, which tell "red mug, blue plate" from "blue mug, red plate"."""
COMMON_WEIGHT = 0.2
"""Of a word of COMMON, where others have 1."""
RULES = 1
"""Counts up when the same text gets another vector."""

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def words(text: str) -> list[str]:
    """The words of a text, in small letters; where nothing parts words, its characters."""
    text = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFKC", text).casefold())
    # not by \w, which ends Indic words at their vowel signs
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


COMMON = frozenset(
    words(
        "a an the and or of in on at to into for from by with as is are was were be been it its this that these those "
        "there he she they his her their i you we me my your our do does did has have had can will would "
        "what which who whose where when how why"
    )
)
"""English words that say little of what a text is about; of other languages, all words count alike."""


class LexicalEmbedder:
    """Words and pairs of neighbouring words, each in a place and with a sign that its hash says (feature hashing, arXiv
    0902.2206). The same on all machines."""

    mark = Mark(
        "lexical",
        DIMENSION,
        hashlib.blake2b(
            repr((RULES, DIMENSION, PAIR_WEIGHT, COMMON_WEIGHT, sorted(COMMON))).encode(), digest_size=16
        ).hexdigest(),
    )

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Vectors of length 1; 0 for a text without words."""
        return np.array([self._vector(text) for text in texts], np.float32).reshape(len(texts), DIMENSION)

    def _vector(self, text: str) -> list[float]:
        x_D = [0.0] * DIMENSION
        for term, weight in _weights(words(text)).items():
            place, sign = _place(term)
            x_D[place] += sign * weight
        # neither logarithms nor a library's sums, whose last digits differ from machine to machine
        length = math.sqrt(math.fsum(x * x for x in x_D))
        return [x / length for x in x_D] if length else x_D


def _weights(found: Sequence[str]) -> dict[str, float]:
    """What words and pairs weigh: by the square root of how often they occur."""
    weights = {word: _weight(word) * math.sqrt(n) for word, n in Counter(found).items()}
    for (one, other), n in Counter(zip(found, found[1:], strict=False)).items():
        weights[f"{one} {other}"] = PAIR_WEIGHT * _weight(one) * _weight(other) * math.sqrt(n)
    return weights


def _weight(word: str) -> float:
    return COMMON_WEIGHT if word in COMMON else 1.0


@functools.lru_cache(maxsize=1 << 16)
def _place(term: str) -> tuple[int, int]:
    number = int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest(), "little")
    return number % DIMENSION, 1 if number >> 63 else -1


class LexicalReranker:
    """BM25 (Robertson and Zaragoza 2009, section 3): words of the question count the more, the fewer of the texts have
    them."""

    name = "lexical"

    def __init__(self, saturation: float = 1.2, length: float = 0.75):
        """k1 and b: how soon repeating a word adds nothing, and how much long texts are held back."""
        self.saturation, self.length = saturation, length

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """0 for texts that share no word with the question."""
        counts = [Counter(words(text)) for text in texts]
        mean = sum(count.total() for count in counts) / max(len(counts), 1) or 1.0
        scores = [0.0] * len(counts)
        for word in sorted(set(words(query))):
            having = sum(word in count for count in counts)
            rarity = math.log1p((len(counts) - having + 0.5) / (having + 0.5))
            for n, count in enumerate(counts):
                held = self.saturation * (1 - self.length + self.length * count.total() / mean)
                scores[n] += rarity * count[word] * (self.saturation + 1) / (count[word] + held)
        return scores


# --- by encoders ------------------------------------------------------------------------------------------------------


class EncoderEmbedder:
    """An encoder of text, see `hub.text_encoder.load_embedder`."""

    def __init__(self, model: TextModel):
        self.model = model
        self.mark = Mark(model.name, model.programs.width, model.digest)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Long texts are cut; an empty one has a vector, too."""
        return self.model.programs(self.model.tokenizer.texts(texts))


class EncoderReranker:
    """An encoder that reads a question and a text together, see `hub.text_encoder.load_reranker`."""

    def __init__(self, model: TextModel):
        self.model, self.name = model, model.name

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """Logits."""
        return self.model.programs(self.model.tokenizer.pairs(query, texts))[:, 0].tolist()


class CosineReranker:
    """The likeness of vectors, where there is no re-ranker."""

    def __init__(self, embedder: Embedder):
        self.embedder, self.name = embedder, f"cosine of {embedder.mark.name}"

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """From -1 to 1."""
        return (self.embedder(texts) @ self.embedder([query])[0]).tolist()


# --- by tables --------------------------------------------------------------------------------------------------------


class TableEmbedder:
    """Vectors that were written down, for tests."""

    def __init__(self, vectors: Mapping[str, np.ndarray]):
        self.vectors = {text: np.asarray(x_D, np.float32) for text, x_D in vectors.items()}
        widths = {x_D.shape for x_D in self.vectors.values()}
        if len(widths) != 1:
            raise ValueError(f"a table must hold vectors of one width, got {sorted(widths)}")
        [(width,)] = widths
        content = repr([(text, x_D.tobytes()) for text, x_D in sorted(self.vectors.items(), key=lambda item: item[0])])
        digest = hashlib.blake2b(content.encode("utf-8", "backslashreplace"), digest_size=16).hexdigest()
        self.mark = Mark("table", width, digest)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Raises ValueError for a text that is not there."""
        for text in texts:
            if text not in self.vectors:
                raise ValueError(f"the table has no vector of {text!r:.100}")
        return np.array([self.vectors[text] for text in texts], np.float32).reshape(len(texts), self.mark.dimension)


class TableReranker:
    """Scores of a question and a text that were written down, for tests."""

    name = "table"

    def __init__(self, scores: Mapping[tuple[str, str], float]):
        self.scores = dict(scores)

    def __call__(self, query: str, texts: Sequence[str]) -> list[float]:
        """Raises ValueError for a pair that is not there."""
        for text in texts:
            if (query, text) not in self.scores:
                raise ValueError(f"the table has no score of {text!r:.100} for {query!r:.100}")
        return [self.scores[query, text] for text in texts]
