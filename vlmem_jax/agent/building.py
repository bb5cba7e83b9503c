"""A memory of a video, made layer by layer from its segments (MM-Mem, section 3)."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from vlmem_jax.agent import prompts
from vlmem_jax.agent.calls import Call, Reply, Work
from vlmem_jax.agent.gates import strict
from vlmem_jax.agent.manager import ACTIONS, Action, ManageConfig, Manager, thinned, view
from vlmem_jax.agent.nodes import Episode, Frame, Segment
from vlmem_jax.agent.parsing import parse_action, parse_json
from vlmem_jax.agent.segments import Span

FramesOf = Callable[[Span, float], tuple[Frame, ...]]
"""`frames_of(span, fps)`: frames of a stretch of the video, so many a second."""


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


def build(segments: Sequence[Segment], frames_of: FramesOf, config: BuildConfig = BuildConfig()) -> Work[Pyramid]:
    """The memory of a video, from its segments without captions; those without frames have none."""
    captioned = yield from _captioned(segments, config)
    episodes = yield from episodes_of(captioned, frames_of, config)
    found: dict[int, dict[str, Any]] = {one.number: {} for one in episodes}
    left = list(episodes)
    for _ in range(config.attempts):
        calls = [prompts.extract(_shown(frames_of, one, config.schema_fps, config)) for one in left]
        replies = (yield calls) if calls else []
        for episode, reply in zip(left, replies, strict=True):
            if isinstance(parsed := parse_json(reply.text), dict):
                found[episode.number] = parsed
        left = [one for one in left if not found[one.number]]
    return Pyramid(captioned, episodes, found)


def _captioned(segments: Sequence[Segment], config: BuildConfig) -> Work[list[Segment]]:
    """Segments do not depend on each other, so all are asked for at once."""
    shown = [dataclasses.replace(one, frames=_thinned(one.frames, config)) for one in segments]
    calls = [prompts.caption(one) for one in shown if one.frames]
    replies: Iterator[Reply] = iter((yield calls) if calls else [])
    return [dataclasses.replace(one, caption=caption_of(next(replies).text)) if one.frames else one for one in segments]


def episodes_of(segments: Sequence[Segment], frames_of: FramesOf, config: BuildConfig) -> Work[list[Episode]]:
    """Episodes of segments that have captions."""
    state, episodes = Manager(), []

    def narrated(episode: Episode) -> Work[Episode]:
        frames = _shown(frames_of, episode, config.fps, config)
        [reply] = yield [prompts.narrate(frames)]
        return dataclasses.replace(episode, caption=caption_of(reply.text), frames=frames)

    for segment in segments:
        action: Action = "ADD_NEW"
        if state.asks(segment):
            [reply] = yield [decision(state, segment, config.manage)]
            action = action_of(reply)
        state, episode = state.step(segment, action)
        if episode:
            episodes.append((yield from narrated(episode)))
    if state.episode:
        episodes.append((yield from narrated(state.episode)))
    return episodes


def decision(state: Manager, segment: Segment, config: ManageConfig) -> Call:
    """What the manager is asked."""
    told = [member.caption for member in state.members]
    return prompts.decide(state.episode, told, segment, view(state, segment, config))


def _shown(frames_of: FramesOf, episode: Episode, fps: float, config: BuildConfig) -> tuple[Frame, ...]:
    return _thinned(frames_of(Span(episode.start, episode.end), fps), config)


def _thinned(frames: Sequence[Frame], config: BuildConfig) -> tuple[Frame, ...]:
    return thinned(frames, config.images) if config.images else tuple(frames)
