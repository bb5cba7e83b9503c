"""The symbolic layer: what episodes have in common, and which of them a question is about (MM-Mem, section 3.1).

`Schema` is the default: concepts, each with what was said of it, joined by the best of its descriptions within its
kind. `ReleaseSchema` is that of the release, whose one index of first words holds entities, actions and places.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Kind = Literal["entity", "action", "scene"]
KINDS: tuple[Kind, ...] = ("entity", "action", "scene")

Embed = Callable[[Sequence[str]], Float[np.ndarray, "N D"]]
"""Unit vectors of texts."""

Rerank = Callable[[str, Sequence[str]], Sequence[float]]
"""How much each text bears on a question."""


class Texts(NamedTuple):
    """What is said of an episode, by kind."""

    entities: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    scenes: tuple[str, ...] = ()

    @classmethod
    def of(cls, extracted: Mapping[str, Any]) -> "Texts":
        """From what the model extracted: names with a description, if there is one. What is not of this form is left
        out."""

        def listed(kind: str, name: str, more: str = "") -> tuple[str, ...]:
            items = extracted.get(kind)
            items = [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []
            pairs = [(_text(item.get(name)), _text(item.get(more))) for item in items]
            return tuple(f"{name}, {about}" if about else name for name, about in pairs if name)

        return cls(
            listed("entities", "entity name", "description"),
            listed("actions", "entity name", "action description"),
            listed("scenes", "location"),
        )

    @property
    def all(self) -> tuple[str, ...]:
        """All of them, entities first."""
        return self.entities + self.actions + self.scenes


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def name_of(text: str) -> str:
    """What stands before the first comma, in small letters."""
    return text.split(",", 1)[0].strip().lower()


# --- the default ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SchemaConfig:
    """How concepts are joined and found."""

    same: float = 0.7
    """Cosine above which a text is about a known concept."""
    found: float = 0.5
    """Cosine above which a question is about one."""
    first: int = 20
    """Episodes that are compared by their vectors, at most."""
    kept: int = 5
    """Episodes that are left, at most."""

    def __post_init__(self):
        if not 0 < self.kept <= self.first:
            raise ValueError(f"kept must be between 1 and first={self.first}, got {self.kept}")


@dataclasses.dataclass
class Concept:
    """Something that episodes are about."""

    number: int
    kind: Kind
    name: str
    glosses: list[str]
    """All that was said of it, each once."""
    episodes: list[int]
    """In order."""
    vectors_GD: list[np.ndarray]
    """Of the name, and of each gloss that is not the name alone."""


class Schema:
    """Concepts of a video, which grow with each episode. The order of episodes is that of the video."""

    def __init__(self, config: SchemaConfig = SchemaConfig()):
        self.config = config
        self.concepts: list[Concept] = []

    def add(self, episode: int, texts: Texts, embed: Embed) -> list[Concept]:
        """The concepts that an episode grounds, each once; vectors are made once a text."""
        named = [(kind, text) for kind, some in zip(KINDS, texts, strict=True) for text in some if name_of(text)]
        if not named:
            return []
        wanted = list(dict.fromkeys(text for _, text in named)) + [name_of(text) for _, text in named]
        vectors = dict(zip(wanted, embed(wanted), strict=True))
        grounded: dict[int, Concept] = {}
        for kind, text in named:
            concept = self._match(kind, vectors[text]) or self._new(kind, name_of(text), vectors)
            if text not in concept.glosses and text != concept.name:
                concept.glosses.append(text)
                concept.vectors_GD.append(vectors[text])
            if episode not in concept.episodes:
                concept.episodes.append(episode)
            grounded[concept.number] = concept
        return list(grounded.values())

    def _match(self, kind: Kind, vector_D: np.ndarray) -> Concept | None:
        alike = [
            (self._likeness(concept, vector_D), -concept.number) for concept in self.concepts if concept.kind == kind
        ]
        best, number = max(alike, default=(0.0, 0))
        return self.concepts[-number] if best > self.config.same else None

    def _new(self, kind: Kind, name: str, vectors: Mapping[str, np.ndarray]) -> Concept:
        concept = Concept(len(self.concepts), kind, name, [], [], [vectors[name]])
        self.concepts.append(concept)
        return concept

    @staticmethod
    def _likeness(concept: Concept, vector_D: np.ndarray) -> float:
        return float((np.stack(concept.vectors_GD) @ vector_D).max())

    def search(self, query_D: Float[np.ndarray, "D"], also: int = 0) -> list[tuple[int, float]]:
        """Episodes that a question is about, with the likeness of their best concept, best first; where no concept is
        like enough, those that are most like. `also`: episodes beyond these."""
        likeness: dict[int, float] = {}
        for concept in self.concepts:
            score = self._likeness(concept, query_D)
            for episode in concept.episodes:
                likeness[episode] = max(score, likeness.get(episode, -1.0))
        ranked = sorted(likeness.items(), key=lambda item: (-item[1], item[0]))
        found = [item for item in ranked if item[1] > self.config.found] or ranked
        return found[: self.config.first + also]

    def edges(self) -> dict[tuple[int, int], list[str]]:
        """Pairs of episodes, the earlier first, with the names of the concepts that they share."""
        found: dict[tuple[int, int], list[str]] = {}
        for concept in self.concepts:
            for n, one in enumerate(concept.episodes):
                for other in concept.episodes[n + 1 :]:
                    found.setdefault((one, other), []).append(concept.name)
        return found


# --- the release ------------------------------------------------------------------------------------------------------


class ReleaseSchema:
    """The index and the graph of the release, which depend on the order of texts."""

    def __init__(self, config: SchemaConfig = SchemaConfig()):
        self.config = config
        self.texts: dict[int, Texts] = {}
        self.index: dict[str, list[int]] = {}
        """Episodes by first words, in order of coming."""
        self.edges: dict[tuple[int, int], str] = {}
        """The last key that two episodes met under, both ways."""
        self._keys_ND: list[np.ndarray] = []

    def add(self, episode: int, texts: Texts, embed: Embed) -> None:
        """Joins an episode by each of its texts to the key that is most like it, if it is like enough."""
        self.texts[episode] = texts
        for text in texts.all:
            key = name_of(text)
            if not key:
                continue
            if not self.index:
                self._insert(key, episode, embed)
                continue
            likeness_N = np.stack(self._keys_ND) @ embed([text])[0]
            best = int(likeness_N.argmax())
            if likeness_N[best] <= self.config.same:
                self._insert(key, episode, embed)
                continue
            met = list(self.index)[best]
            for other in self.index[met]:
                if other != episode:
                    self.edges[episode, other] = self.edges[other, episode] = met
            if episode not in self.index[met]:
                self.index[met].append(episode)

    def _insert(self, key: str, episode: int, embed: Embed) -> None:
        """Under a key that may be there, which then makes no edge."""
        if key not in self.index:
            self.index[key] = []
            self._keys_ND.append(embed([key])[0])
        if episode not in self.index[key]:
            self.index[key].append(episode)

    def candidates(self, query_D: Float[np.ndarray, "D"], embed: Embed) -> list[int]:
        """Episodes of keys that are like the question, and those whose texts are on the whole."""
        chosen, found = set[int](), self.config.found
        for episodes, key_D in zip(self.index.values(), self._keys_ND, strict=True):
            if key_D @ query_D > found:
                chosen.update(episodes)
        for episode, texts in self.texts.items():
            if episode not in chosen and texts.all and float((embed(texts.all) @ query_D).mean()) > found:
                chosen.add(episode)
        return sorted(chosen)

    def search(self, query: str, embed: Embed, rerank: Rerank) -> list[int]:
        """Episodes for a question, by the re-ranker of those that are nearest by their vectors; few are left as they
        are, and where nothing is like the question, the first of the video are taken."""
        first, kept = self.config.first, self.config.kept
        if not self.index:
            return sorted(self.texts)
        query_D = embed([query])[0]
        chosen = self.candidates(query_D, embed)
        if not chosen:
            return sorted(self.texts)[:kept]
        joined = {episode: " ".join(self.texts[episode].all) for episode in chosen}
        if len(chosen) > first:
            likeness = dict(zip(chosen, embed(list(joined.values())) @ query_D, strict=True))
            chosen = sorted(chosen, key=lambda episode: -likeness[episode])[:first]
        if len(chosen) <= kept:
            return chosen
        scores = dict(zip(chosen, rerank(query, [joined[episode] for episode in chosen]), strict=True))
        return sorted(chosen, key=lambda episode: -scores[episode])[:kept]
