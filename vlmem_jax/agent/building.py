"""A memory of a video, made layer by layer from its segments (MM-Mem, section 3)."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from vlmem_jax.agent import prompts
from vlmem_jax.agent.calls import Call, Reply, Work
from vlmem_jax.agent.gates import strict
from vlmem_jax.agent.manager import ACTIONS, Action, ManageConfig, Manager, thinned, view
from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.parsing import parse_action, parse_json
from vlmem_jax.agent.segments import Span, frames_at_times
from vlmem_jax.agent.subtitles import SILENT, Track, with_said

FramesOf = Callable[[Span, float], tuple[Frame, ...]]
"""`frames_of(span, fps)`: frames of a stretch of the video, so many a second."""


Told = Literal["both", "either", "captions"]
"""What is known of a segment in words: its caption, for which the model is told its subtitles, and these beside it; its
subtitles, or its caption where nothing is said (MM-Mem, section 3.1); or its caption alone, as in the release."""


@dataclasses.dataclass(frozen=True)
class BuildConfig:
    """How much of an episode is kept."""

    manage: ManageConfig = ManageConfig()
    fps: float = 2.0
    """Frames of a second of an episode."""
    schema_fps: float = 1.0
    """Of these, those from which it is extracted what it is about."""
    images: int = 128
    """Frames of a call, at most; 0: there is no limit, as in the release."""
    whole: bool = False
    """Whether an episode has frames of its whole span, those of segments that were discarded too, as in the release."""
    told: Told = "both"
    """What becomes of subtitles."""
    attempts: int = 1
    """How often an extraction that is no object is asked for; greedy answers repeat themselves."""


class Pyramid(NamedTuple):
    """The layers of a memory: segments, episodes, and what was extracted from each."""

    segments: list[Segment]
    episodes: list[Episode]
    extracted: dict[int, dict[str, Any]]
    """By the number of the episode; one whose answer was no object has nothing."""


def caption_of(text: str) -> str:
    """A caption: the JSON in a text, written anew, or else the text."""
    parsed = parse_json(text)
    return text if parsed is None else json.dumps(parsed, ensure_ascii=False)


def action_of(reply: Reply) -> Action:
    """The likeliest label; or, where the model writes, what it wrote."""
    return parse_action(reply.text) if reply.tokens is None else strict(reply.tokens, ACTIONS).label


def text_of(node: Segment | Episode, segments: Mapping[int, Segment], track: Track) -> str:
    """A node in words, as it is compared and told: its caption, and what is said in it; of an episode, in those of its
    segments that are known."""
    members = [node] if isinstance(node, Segment) else [segments[n] for n in node.segments if n in segments]
    return with_said(node.caption, track.said(*(Span(one.start, one.end) for one in members)))


class Builder:
    """A memory that grows segment by segment, in the order of the video; what has been closed stays as it is."""

    def __init__(self, config: BuildConfig = BuildConfig(), frames_of: FramesOf | None = None, track: Track = SILENT):
        """`frames_of`: where the frames of an episode are not those that its segments kept; `track`: the subtitles, of
        which none is used before its time."""
        self.config, self._frames_of, self._state = config, frames_of, Manager()
        self._track = SILENT if config.told == "captions" else track
        self.pyramid = Pyramid([], [], {})

    def add(self, segments: Sequence[Segment]) -> Work[None]:
        """Takes segments without captions; those without frames have none. All are captioned at once."""
        captioned = yield from self._captioned(segments)
        for segment in captioned:
            action: Action = "ADD_NEW"
            if self._state.asks(segment):
                [reply] = yield [decision(self._state, segment, self.config.manage)]
                action = action_of(reply)
            members = self._state.members
            self._state, episode = self._state.step(segment, action)
            self.pyramid.segments.append(segment)
            if episode:
                yield from self._close(episode, members)

    def finish(self) -> Work[Pyramid]:
        """The memory as it is if the video ends here; the builder goes on as if nobody had asked."""
        whole = copy.copy(self)
        segments, episodes, extracted = self.pyramid
        whole.pyramid = Pyramid(list(segments), list(episodes), dict(extracted))
        if self._state.episode:
            yield from whole._close(self._state.episode, self._state.members)
        return whole.pyramid

    def shown(self, episode: Episode) -> tuple[Frame, ...]:
        """The frames of a closed episode from which it is extracted what it is about."""
        members = [one for one in self.pyramid.segments if one.number in episode.segments]
        return self._frames(episode, members, self.config.schema_fps)

    def text(self, node: Segment | Episode) -> str:
        """A closed node in words; see `text_of`."""
        segments = {one.number: one for one in self.pyramid.segments} if isinstance(node, Episode) else {}
        return text_of(node, segments, self._track if self.config.told == "both" else SILENT)

    def _captioned(self, segments: Sequence[Segment]) -> Work[list[Segment]]:
        shown = [self._thinned(one.frames) for one in segments]
        heard = [self._track.said(Span(one.start, one.end)) for one in segments]
        is_known = [self.config.told == "either" and bool(said) for said in heard]
        known = list(zip(shown, heard, is_known, strict=True))
        calls = [prompts.caption(frames, said) for frames, said, is_text in known if frames and not is_text]
        replies = iter((yield calls) if calls else [])
        captions = [
            said if is_text else caption_of(next(replies).text) if frames else "" for frames, said, is_text in known
        ]
        return [dataclasses.replace(one, caption=text) for one, text in zip(segments, captions, strict=True)]

    def _close(self, episode: Episode, members: Sequence[Segment]) -> Work[None]:
        config = self.config
        frames = self._frames(episode, members, config.fps)
        said = self._track.said(*(Span(one.start, one.end) for one in members))
        [reply] = yield [prompts.narrate(frames, said)]
        found, shown = {}, self._frames(episode, members, config.schema_fps)
        for _ in range(config.attempts):
            [extracted] = yield [prompts.extract(shown)]
            if isinstance(parsed := parse_json(extracted.text), dict):
                found = parsed
                break
        self.pyramid.episodes.append(dataclasses.replace(episode, caption=caption_of(reply.text), frames=frames))
        self.pyramid.extracted[episode.number] = found

    def _frames(self, episode: Episode, members: Sequence[Segment], fps: float) -> tuple[Frame, ...]:
        span = Span(episode.start, episode.end)
        if self._frames_of:
            return self._thinned(self._frames_of(span, fps))
        if self.config.whole:
            members = self.pyramid.segments
        kept = [frame for member in members for frame in member.frames]
        return self._thinned([kept[n] for n in frames_at_times(span, [frame.time for frame in kept], fps).tolist()])

    def _thinned(self, frames: Sequence[Frame]) -> tuple[Frame, ...]:
        return thinned(frames, self.config.images) if self.config.images else tuple(frames)


def build(
    segments: Sequence[Segment],
    config: BuildConfig = BuildConfig(),
    frames_of: FramesOf | None = None,
    track: Track = SILENT,
) -> Work[Pyramid]:
    """The memory of a video, from all of its segments; see `Builder`."""
    builder = Builder(config, frames_of, track)
    yield from builder.add(segments)
    return (yield from builder.finish())


def decision(state: Manager, segment: Segment, config: ManageConfig) -> Call:
    """What the manager is asked."""
    told = [member.caption for member in state.members]
    return prompts.decide(state.episode, told, segment, view(state, segment, config))
