"""A model whose replies are functions of the calls, and a small memory to ask."""

import collections
import math

import numpy as np

from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Reply
from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.retrieve import Memory
from vlmem_jax.agent.schema import SchemaConfig
from vlmem_jax.agent.segments import Span

SECONDS = 10.0


class Scripted:
    """`replies[kind](call)`: a text, or probabilities of labels; `asked` are all calls so far, by kind."""

    def __init__(self, **replies):
        self.replies, self.asked, self.rounds = replies, collections.defaultdict(list), []

    def answer(self, calls):
        self.rounds.append([call.kind for call in calls])
        return [self._reply(call) for call in calls]

    def _reply(self, call):
        self.asked[call.kind].append(call)
        reply = self.replies[call.kind](call)
        if isinstance(reply, str):
            return Reply(reply)
        return Reply(tokens=[(label, math.log(p)) for label, p in reply.items() if p])


def frames_of(span, fps):
    """A frame each 1 / fps seconds, named by its time."""
    times = np.arange(math.ceil(span.start * fps), math.ceil(span.end * fps)) / fps
    return tuple(Frame(f"{time:g}", float(time)) for time in times)


def segment(number, caption=""):
    span = Span(number * SECONDS, (number + 1) * SECONDS)
    return Segment(number, *span, caption, frames_of(span, 5.0))


def embed(texts):
    """Each letter has an axis."""
    vectors = np.array([[text.lower().count(chr(97 + n)) for n in range(26)] for text in texts], float)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def rerank(query, texts):
    return (embed(texts) @ embed([query])[0]).tolist()


def memory(places, each=2):
    """A memory with an episode of `each` segments for each place, which is all that is known of it."""
    segments = [segment(n, f"at the {places[n // each]}") for n in range(each * len(places))]
    episodes, extracted = [], {}
    for n, place in enumerate(places):
        span = Span(n * each * SECONDS, (n + 1) * each * SECONDS)
        numbers = tuple(range(n * each, (n + 1) * each))
        episodes.append(Episode(n, *span, numbers, f"somebody is at the {place}", frames_of(span, 2.0)))
        extracted[n] = {"scenes": [{"location": place}]}
    pyramid = Pyramid(segments, episodes, extracted)
    whole = Span(0.0, len(segments) * SECONDS)
    return Memory.of(pyramid, frames_of, whole, embed, SchemaConfig(first=4, kept=2))
