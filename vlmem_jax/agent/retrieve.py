"""An answer from a memory: from what episodes are about, down to their frames, as far as it takes to be sure (MM-Mem,
section 3.3).

Each stage chooses what bears on the question, shows it, and is believed if the entropy of its answer is low; the last
is believed whatever it is. `RetrieveConfig()` is the corrected rule, `RELEASE` that of the release, faults and all.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlmem_jax.agent import gates, prompts
from vlmem_jax.agent.answers import Answer, Stage, Visit
from vlmem_jax.agent.building import FramesOf, Pyramid, text_of
from vlmem_jax.agent.calls import Call, Reply, Work
from vlmem_jax.agent.gates import Belief
from vlmem_jax.agent.manager import thinned
from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.schema import Embed, ReleaseSchema, Rerank, Schema, SchemaConfig, Texts
from vlmem_jax.agent.segments import Span
from vlmem_jax.agent.subtitles import SILENT, Track

INITIAL = 64
"""Frames of the whole video that are shown without memory, at most."""
N = TypeVar("N", Segment, Episode)
LONGEST = 4096
"""Characters that are told of a node, at most; what others wrote may have any length. The release has no limit."""


@dataclasses.dataclass(frozen=True)
class RetrieveConfig:
    """How far a question goes down, and what it takes along."""

    gamma: float = gates.GAMMA
    """Entropy, in nats, up to which an answer is believed."""
    scaled: bool = True
    """Whether that is for four options, and other numbers have a bound of their own."""
    strict: bool = True
    """Whether labels count as such; if not, and where nothing was said, as in the release."""
    mass: float = 1e-4
    """Probability of all labels together, below which an answer said nothing, however sure it looks among them."""
    flat: float = 0.01
    """Nats by which a stage must be surer than the one before it, or it adds nothing."""
    patience: int = 0
    """After so many stages that add nothing, one after the other, nobody looks further; 0: that is no reason."""
    episodes: int = 3
    segments: int = 2
    """So many are taken down, at most."""
    nearest: int = 10
    """Episodes that are looked at, at most."""
    clips: int = 32
    """Segments whose bearing is asked for, at most: those whose words are most like the question; 0: all of an episode,
    however long, as in the release."""
    guard: int = 2
    """Episodes beyond those that the schema finds, by their captions; 0: none, and the re-ranker orders them first."""
    looked: int = 16
    """Frames of a clip whose bearing is asked for, at most; 0: all."""
    images: int = 128
    """Frames of an answer, at most; 0: there is no limit."""
    initial: float = 0.0
    """Share of the answer without memory that is believed at once; 0: nobody asks without memory."""
    is_kept: bool = True
    """Whether what a stage said goes on to the next, evidence stands in order of time, and the surest stage is believed
    where the last is less sure."""
    worse: float = 0.2
    """Nats by which it must be."""
    enough: float = 0.5
    """Probability that what was found is enough, below which an answer that is not sure is not in memory; 0: nobody
    asks."""
    open_enough: float = 0.8
    """The same, at which an answer in words is believed."""

    def __post_init__(self):
        for names, least, most in (
            (("episodes", "segments", "nearest"), 1, math.inf),
            (("gamma", "flat", "patience", "clips", "guard", "looked", "images", "worse"), 0, math.inf),
            (("mass", "initial", "enough", "open_enough"), 0, 1),
        ):
            for name in names:
                if not least <= (value := getattr(self, name)) <= most:
                    limits = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                    raise ValueError(f"{name} must be {limits}, got {value}")


RELEASE = RetrieveConfig(
    gamma=0.5,
    scaled=False,
    strict=False,
    mass=0.0,
    segments=3,
    clips=0,
    guard=0,
    looked=0,
    images=0,
    initial=0.8,
    is_kept=False,
    enough=0.0,
)


class Memory(NamedTuple):
    """A memory that can be asked."""

    pyramid: Pyramid
    schema: Schema | ReleaseSchema
    frames_of: FramesOf
    span: Span
    """Of the whole video."""
    schema_fps: float = 0.0
    """Frames of a second of what an episode is about; 0: those of the episode."""
    track: Track = SILENT
    """What is said in nodes beside their captions."""

    @classmethod
    def of(
        cls,
        pyramid: Pyramid,
        frames_of: FramesOf,
        span: Span,
        embed: Embed,
        config: SchemaConfig,
        release: bool = False,
    ) -> "Memory":
        """With its schema, made from what was extracted."""
        schema = ReleaseSchema(config) if release else Schema(config)
        for episode in pyramid.episodes:
            schema.add(episode.number, Texts.of(pyramid.extracted[episode.number]), embed)
        return cls(pyramid, schema, frames_of, span)


def answer(
    memory: Memory,
    question: str,
    options: Sequence[str],
    embed: Embed,
    rerank: Rerank,
    config: RetrieveConfig = RetrieveConfig(),
) -> Work[Answer]:
    """Asks a memory. Raises ValueError for more options than there are letters."""
    return (yield from _Question(memory, question, options, embed, rerank, config).answer())


class _Question:
    def __init__(
        self,
        memory: Memory,
        question: str,
        options: Sequence[str],
        embed: Embed,
        rerank: Rerank,
        config: RetrieveConfig,
    ):
        self.memory, self.question, self.config, self.embed, self.rerank = memory, question, config, embed, rerank
        self.options = gates.with_letters(options, release=not config.strict)
        self.letters = list(gates.OPTIONS[: len(options)])
        self.episodes = {one.number: one for one in memory.pyramid.episodes}
        self.segments = {one.number: one for one in memory.pyramid.segments}
        self.bound = gates.bound(len(options), config.gamma, config.scaled) if options else 0.0
        self.told: list[str] = []
        """What the last stage was told; where it is kept, with what those before it were."""
        self.shown: list[Frame] = []
        self.trace: list[Visit] = []
        self.calls = self.images = 0

    def answer(self) -> Work[Answer]:
        yield from self._descend()
        return (yield from self._concluded())

    def _descend(self) -> Work[None]:
        """Stage by stage, until one is to be the last."""
        if self.config.initial and (yield from self._initial()):
            return
        found = self._related()
        if (yield from self._ask("L3", [self.episodes[n] for n in found], self._about, self._for_schema)):
            return
        if self.config.enough and not (self.episodes or self.segments):
            return  # nothing is remembered, so nothing else can be found
        known = self._guarded(found)
        chosen = yield from self._chosen(known, self.config.episodes)
        if (yield from self._ask("L2", chosen, lambda one: f"[Episode {one.number}] {self._text(one)}", _own)):
            return
        numbers = sorted({n for one in chosen for n in one.segments}) or sorted(self.segments)
        clips = [self.segments[n] for n in numbers if n in self.segments]
        if 0 < self.config.clips < len(clips):
            clips = self._nearest(clips, self.config.clips)
        chosen = yield from self._chosen(clips, self.config.segments)
        yield from self._ask("L1", chosen, lambda one: f"[Scene {one.number}] {self._text(one)}", _own)

    # --- what is shown ------------------------------------------------------------------------------------------------

    def _related(self) -> list[int]:
        """Episodes that the schema finds."""
        schema = self.memory.schema
        if isinstance(schema, ReleaseSchema):
            return schema.search(self.question, self.embed, self.rerank)
        config, texts = schema.config, self.memory.pyramid.extracted
        found = [n for n, _ in schema.search(self.embed([self.question])[0])] or sorted(self.episodes)[: config.first]
        if len(found) > config.kept:
            joined = [" ".join(Texts.of(texts[n]).all) for n in found]
            scores = dict(zip(found, self.rerank(self.question, joined), strict=True))
            found = sorted(found, key=lambda n: (-scores[n], n))[: config.kept]
        return sorted(found)

    def _guarded(self, found: Sequence[int]) -> list[Episode]:
        """Those, as they are to be looked at, and others whose captions are nearest to the question."""
        config, known = self.config, [self.episodes[n] for n in found] or list(self.episodes.values())
        if len(known) > config.nearest:
            known = self._nearest(known, config.nearest)
        if config.guard:
            rest = [one for one in self.episodes.values() if one not in known and one.caption]
            return known + self._nearest(rest, config.guard)
        if len(known) <= config.episodes:
            return known
        scores = self.rerank(self.question, [self._text(one) for one in known])
        return [known[n] for n in np.argsort(-np.asarray(scores), kind="stable")]

    def _nearest(self, nodes: Sequence[N], most: int) -> list[N]:
        """Those whose words are most like the question."""
        if not nodes:
            return []
        likeness_N = self.embed([self._text(one) for one in nodes]) @ self.embed([self.question])[0]
        return [nodes[n] for n in np.argsort(-likeness_N, kind="stable")[:most]]

    def _chosen(self, nodes: Sequence[Any], most: int) -> Work[list[Any]]:
        """Nodes whose frames bear most on the question, by the probability that the model says so."""
        config = self.config
        if config.is_kept and len(nodes) <= most:
            return sorted(nodes, key=lambda one: one.start)  # all are taken, and time orders them
        looked = [thinned(one.frames, config.looked or len(one.frames)) for one in nodes]
        calls = [prompts.relevant(self.question, self.options, shown) for shown in looked if shown]
        replies = iter((yield from self._asked(calls)))
        scores = [self._yes(next(replies)) if shown else 0.0 for shown in looked]
        order = sorted(range(len(nodes)), key=lambda n: -scores[n])[:most]
        chosen = [nodes[n] for n in order]
        return sorted(chosen, key=lambda one: one.start) if config.is_kept else chosen

    def _yes(self, reply: Reply) -> float:
        read = gates.strict(reply.tokens, ("yes", "no"), exact_case=False) if self.config.strict else None
        return (read or gates.yes_or_no(reply.tokens)).probabilities["yes"]

    def _text(self, node: Segment | Episode) -> str:
        return text_of(node, self.segments, self.memory.track)

    def _about(self, episode: Episode) -> str:
        """What an episode is about, in a line."""
        said = self.memory.pyramid.extracted[episode.number]
        kinds = (
            ("Entities", "entities", "entity name", "description"),
            ("Actions", "actions", "entity name", "action description"),
            ("Scenes", "scenes", "location", ""),
        )
        lists = [f"{title}: {_listed(said, kind, name, more)}" for title, kind, name, more in kinds if said.get(kind)]
        return f"[Segment {episode.number}] {' | '.join(lists)}"

    def _for_schema(self, episode: Episode) -> Sequence[Frame]:
        fps = self.memory.schema_fps
        return self.memory.frames_of(Span(episode.start, episode.end), fps) if fps else episode.frames

    # --- what is said -------------------------------------------------------------------------------------------------

    def _asked(self, calls: list[Call]) -> Work[list[Reply]]:
        """Replies of the model, counted."""
        self.calls += len(calls)
        self.images += sum(len(call.frames) for call in calls)
        return (yield calls) if calls else []

    def _initial(self) -> Work[bool]:
        """Without memory, from frames of the whole video."""
        span, most = self.memory.span, min(INITIAL, self.config.images or INITIAL)
        frames = thinned(self.memory.frames_of(span, most / max(span.end - span.start, 1.0)), most)
        [reply] = yield from self._asked([prompts.answer(self.question, self.options, self.letters, (), frames)])
        belief = self._believed(reply)
        is_sure = max(belief.probabilities.values(), default=0.0) >= self.config.initial
        self.trace.append(Visit("initial", belief, reply.text, is_sure))
        return is_sure

    def _ask(
        self,
        stage: Stage,
        nodes: Sequence[Any],
        line: Callable[[Any], str],
        frames: Callable[[Any], Sequence[Frame]],
    ) -> Work[bool]:
        """Whether a stage is to be the last."""
        config, lines = self.config, [line(one) for one in nodes]
        if config.is_kept:
            lines = [
                f"{prompts.seconds(one.start, one.end)} {text[:LONGEST]}"
                for one, text in zip(nodes, lines, strict=True)
            ]
            lines = self.told + lines
        each = config.images // max(len(nodes), 1)
        shown = [frame for one in nodes for frame in (thinned(frames(one), each) if config.images else frames(one))]
        self.told, self.shown = lines, shown
        calls = [prompts.answer(self.question, self.options, self.letters, lines, shown)]
        if not self.options:
            calls.append(prompts.sufficient(self.question, lines, shown))
        reply, *others = yield from self._asked(calls)
        belief, enough = self._believed(reply), next(map(self._yes, others), None)
        if enough is None:
            is_low = belief.entropy <= self.bound if config.strict else belief.entropy < self.bound
            is_sure = is_low and belief.mass >= config.mass
        else:
            is_sure = enough >= config.open_enough
        spans = tuple(Span(one.start, one.end) for one in nodes)
        taken = tuple(one.number for one in nodes)
        self.trace.append(Visit(stage, belief, reply.text, is_sure, taken, spans, enough))
        return is_sure or self._is_flat()

    def _is_flat(self) -> bool:
        """Whether stages have ceased to add anything. One that said nothing is no such stage: the next may."""
        config, beliefs = self.config, [visit.belief for visit in self.trace if visit.stage != "initial"]
        if not (self.options and config.patience and beliefs[-1].mass >= config.mass):
            return False
        _, reason = gates.stop([belief.entropy for belief in beliefs], -1.0, config.flat, config.patience)
        return reason == "plateau"

    def _believed(self, reply: Reply) -> Belief:
        if not self.options:
            return Belief({}, 0.0)
        read = gates.strict if self.config.strict else gates.by_first_letter
        return read(reply.tokens, self.letters)

    def _concluded(self) -> Work[Answer]:
        """What is believed in the end, though perhaps nothing was sure."""
        config, visit = self.config, self.trace[-1]
        if visit.is_sure:
            return self._result(visit)
        if config.is_kept and self.options:
            said = [one for one in self.trace if one.belief.mass >= config.mass] or self.trace
            surest = min(said, key=lambda one: one.belief.entropy)
            if visit not in said or visit.belief.entropy > surest.belief.entropy + config.worse:
                visit = surest
        if not config.enough:
            return self._result(visit)
        if not (self.told or self.shown):
            return self._result(visit, in_memory=False)
        enough = self.trace[-1].enough
        if enough is None:
            [reply] = yield from self._asked([prompts.sufficient(self.question, self.told, self.shown)])
            enough = self._yes(reply)
            self.trace[-1] = self.trace[-1]._replace(enough=enough)
        return self._result(visit, enough >= config.enough)

    def _result(self, visit: Visit, in_memory: bool = True) -> Answer:
        label = visit.belief.label if self.options else ""
        text = self.options[self.letters.index(label)] if self.options else visit.text
        return Answer(label, text, visit.stage, visit.belief, in_memory, tuple(self.trace), self.calls, self.images)


def _own(node: Episode | Segment) -> Sequence[Frame]:
    return node.frames


def _listed(said: Mapping[str, Any], kind: str, name: str, more: str) -> str:
    def one(item: Mapping[str, Any]) -> str:
        about = item.get(more) if more else None
        return f"{item.get(name, '')}: {about}" if about else str(item.get(name, ""))

    items: Iterable[Any] = said[kind] if isinstance(said[kind], list) else ()
    return "; ".join(one(item) for item in items if isinstance(item, Mapping))
