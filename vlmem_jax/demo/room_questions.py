"""Questions about a room that a video showed, in types of VSI-Bench (arXiv 2412.14171), and simpler ones to learn by.

Asked is only what was seen: a poster counts as seen where it takes SEEN pixels of a frame, and what is on it as
readable where it takes READABLE.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from vlmem_jax.demo.questions import TURN_TOKENS, Question
from vlmem_jax.demo.rooms import FEWEST, MOST, NAMES, Room, Seen
from vlmem_jax.processing.chat import FRAME, VIDEO_MARKER

SEEN, READABLE = 24, 250
"""Pixels."""
Type = Literal["direction", "distance", "order", "count", "digit"]
TYPES: tuple[Type, ...] = ("direction", "distance", "order", "count", "digit")
"""Types of questions: relative direction and distance, from where the video begins; appearance order; counting; and
what is on a poster."""
CHANCE = {"direction": 1 / 4, "distance": 1 / 2, "order": 1 / 2, "count": 1 / (MOST - FEWEST + 1), "digit": 1 / 10}
Kind = Type | Literal["seen", "far", "posters", "colours", "directions", "distances"]
"""Besides the types: whether a colour is seen, how far away a poster is, and all posters one after the other, in the
order of appearance."""
PLACES = ("front-left", "front-right", "back-left", "back-right")
APART = 0.3
"""Metres by which distances that are compared differ at least."""
OFF_AXIS = 0.2
"""Radians by which a direction that is asked for is off the border to another, at least."""
KEPT = (FRAME, *NAMES, *PLACES, "yes", "no", "direction", "nearer", "first", "many", "written", "each", "any", "far")
IGNORED = (
    *("appear", "appears", "begins", "from", "how", "me", "on", "or", "order", "poster", "posters", "tell", "there"),
    *("them", "they", "to", "video", "where"),
)
"""Words that the demo's tokenizer needs besides, and those that it drops besides."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a video showed of a room: of each poster, in its order."""

    colours: tuple[str, ...]
    digits: tuple[int, ...]
    pixels_N: Int[np.ndarray, "N"]
    """Of the frame that shows most of it."""
    first_N: Int[np.ndarray, "N"]
    """The first frame in which it is seen."""
    left_N: Float[np.ndarray, "N"]
    """Where it is in that frame, from left to right."""
    middles_N2: Float[np.ndarray, "N 2"]
    """Metres to the right and to the front of where the video begins."""

    @classmethod
    def of(cls, room: Room, seen: Seen) -> "Facts":
        shown_NTSS = seen.posters_TSS == np.arange(len(room.posters))[:, None, None, None]
        pixels_NT = shown_NTSS.sum((2, 3))
        first_N = (pixels_NT >= SEEN).argmax(1)
        columns_NS = shown_NTSS[np.arange(len(first_N)), first_N].sum(1)
        left_N = (columns_NS * np.arange(columns_NS.shape[1])).sum(1) / np.maximum(columns_NS.sum(1), 1)
        start_44 = np.linalg.inv(seen.poses_T44[0])
        middles_N3 = np.array([room.middle(one) for one in room.posters]) @ start_44[:3, :3].T + start_44[:3, 3]
        colours = tuple(NAMES[one.colour] for one in room.posters)
        digits = tuple(one.digit for one in room.posters)
        return cls(colours, digits, pixels_NT.max(1), first_N, left_N, middles_N3[:, [0, 2]])

    @property
    def seen(self) -> list[int]:
        """Posters that are seen, in the order of appearance, from left to right where several appear at once."""
        order = np.lexsort((self.left_N, self.first_N))
        return [n for n in order.tolist() if self.pixels_N[n] >= SEEN]

    @property
    def readable(self) -> list[int]:
        """Those of them whose digit can be read."""
        return [n for n in self.seen if self.pixels_N[n] >= READABLE]

    def place(self, poster: int) -> str:
        """Where a poster is, seen from where the video begins."""
        right, front = self.middles_N2[poster]
        return f"{'front' if front > 0 else 'back'}-{'right' if right > 0 else 'left'}"

    def clear(self, poster: int) -> bool:
        """Whether a poster is well inside its quarter of the directions."""
        right, front = np.abs(self.middles_N2[poster])
        return bool(OFF_AXIS < np.arctan2(right, front) < np.pi / 2 - OFF_AXIS)

    def distance(self, poster: int) -> float:
        return float(np.linalg.norm(self.middles_N2[poster]))

    def metres(self, poster: int) -> str:
        """How far a poster is from where the video begins, to the nearest metre."""
        return str(round(self.distance(poster)))


def questions(facts: Facts, kind: Kind) -> list[Question]:
    """Every question of this kind that the video answers."""
    colours, seen = facts.colours, facts.seen
    pairs = [(one, other) for one in seen for other in seen if one != other]
    if kind == "direction":
        text = "From where the video begins, in which direction is the {} poster?"
        return [_about(text, colours[n], facts.place(n)) for n in seen if facts.clear(n)]
    if kind == "distance":
        text = "Which is nearer to where the video begins, the {} or the {} poster?"
        found = [(pair, min(pair, key=facts.distance)) for pair in pairs]
        apart = [(pair, n) for pair, n in found if abs(facts.distance(pair[0]) - facts.distance(pair[1])) > APART]
        return [_question(text.format(*(colours[n] for n in pair)), colours[nearer], 3) for pair, nearer in apart]
    if kind == "order":
        text = "Which appears first, the {} or the {} poster?"
        apart = [pair for pair in pairs if facts.first_N[pair[0]] != facts.first_N[pair[1]]]
        return [
            _question(text.format(*(colours[n] for n in pair)), colours[min(pair, key=lambda n: facts.first_N[n])], 3)
            for pair in apart
        ]
    if kind == "count":
        return [_question("How many posters are there?", str(len(seen)), 1)]
    if kind == "digit":
        text = "Which digit is written on the {} poster?"
        return [_about(text, colours[n], str(facts.digits[n])) for n in facts.readable]
    if kind == "seen":
        hidden = [name for name in NAMES if name not in colours]
        both = [(colours[n], "yes") for n in seen] + [(name, "no") for name in hidden]
        return [_question(f"Is there any {name} poster?", answer, 2) for name, answer in both]
    if kind == "far":
        text = "How far from where the video begins is the {} poster?"
        return [_about(text, colours[n], facts.metres(n)) for n in seen]
    if kind == "posters":
        text = "Tell me all posters in the order they appear, and which digit is written on them."
        return [_listed(text, [f"{colours[n]} {facts.digits[n]}" for n in seen])] if facts.readable == seen else []
    if kind == "colours":
        return [_question("Tell me all posters in the order they appear.", " ".join(colours[n] for n in seen), 1)]
    if kind == "distances":
        text = "Tell me all posters in the order they appear, and how far they are from where the video begins."
        return [_listed(text, [f"{colours[n]} {facts.metres(n)}" for n in seen])]
    text = "Tell me all posters in the order they appear, and in which direction they are."
    return [_listed(text, [f"{colours[n]} {facts.place(n)}" for n in seen])]


def conversation(asked: Sequence[Question]) -> list[dict[str, str]]:
    """The `conversations` of a JSONL line about one video."""
    turns = []
    for question in asked:
        turns.append({"from": "human", "value": question.text if turns else f"{VIDEO_MARKER}\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return turns


def fill(rng: np.random.Generator, facts: Facts, kinds: Sequence[Kind], tokens: int) -> list[Question]:
    """Different questions of these kinds that take at most `tokens`, and nearly as many; each kind as often as it
    stands among them, as long as there are questions of it."""
    found = {kind: questions(facts, kind) for kind in dict.fromkeys(kinds)}
    left = {kind: [every[n] for n in rng.permutation(len(every))] for kind, every in found.items() if every}
    chosen: list[Question] = []
    while left and tokens >= TURN_TOKENS + 2:
        present = [kind for kind in kinds if kind in left]
        kind = present[int(rng.integers(len(present)))]
        question = left[kind].pop()
        if not left[kind]:
            del left[kind]
        if question.tokens <= tokens:
            chosen.append(question)
            tokens -= question.tokens
    return chosen


def _about(text: str, colour: str, answer: str) -> Question:
    """A question about one poster, whose answer names it first: so a small model learns sooner where to look."""
    return _question(text.format(colour), f"{colour} {answer}", 2)


def _listed(text: str, answers: Sequence[str]) -> Question:
    return _question(text, " ".join(answers), 2)


def _question(text: str, answer: str, words: int) -> Question:
    return Question(text, answer, TURN_TOKENS + words + len(answer.split()))
