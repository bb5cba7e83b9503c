"""The memory of a video as one uses it: `Memory.open(folder).ask("Where are the keys?")`."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from PIL import Image

from vlmem_jax.agent import prompts, retrieve
from vlmem_jax.agent.answers import Answer
from vlmem_jax.agent.building import Pyramid
from vlmem_jax.agent.calls import Model, Work, run
from vlmem_jax.agent.config import AgentConfig, resolve
from vlmem_jax.agent.embed import CosineReranker, Embedder, LexicalEmbedder, LexicalReranker, Reranker
from vlmem_jax.agent.frames import FrameFiles
from vlmem_jax.agent.model import EngineModel
from vlmem_jax.agent.nodes import Cue, Frame
from vlmem_jax.agent.schema import Schema
from vlmem_jax.agent.segments import Span, frames_at_times
from vlmem_jax.agent.store import Store, open_store
from vlmem_jax.agent.subtitles import MOST, Track
from vlmem_jax.config import override
from vlmem_jax.generate import Engine, LoadedModel, load_model
from vlmem_jax.runtime.shapes import PoolShape

TEXT = 2048
"""Tokens of a call beside frames and what is remembered."""
UNLIMITED, UNLIMITED_SIDE = 256, 1024
"""Frames that a call has room for, and pixels of a side, where the config sets no limit."""
KEPT = 4
"""Visual tokens are kept of so many times what a call shows."""


class Helpers(NamedTuple):
    """What texts are compared by."""

    embedder: Embedder
    reranker: Reranker

    @classmethod
    def of(cls, embedder: Embedder | None = None, reranker: Reranker | None = None) -> "Helpers":
        """By default words alone; with another embedder, and no re-ranker, the likeness of its vectors."""
        if reranker is None:
            reranker = CosineReranker(embedder) if embedder else LexicalReranker()
        return cls(embedder or LexicalEmbedder(), reranker)


class Memory:
    """The memory of a video, to be asked. What it holds is read when it is opened."""

    def __init__(self, store: Store, config: AgentConfig, helpers: Helpers, model: Callable[[], Model]):
        """`model`: gives what answers, when it is first asked. Raises ValueError where the vectors are of another
        embedder."""
        self.store, self.config, self.helpers = store, config, helpers
        if (mark := store.made.get("embedder")) is not None:
            helpers.embedder.mark.check(mark, str(store.folder))
        self._make_model, self._model = model, None
        self.pyramid = store.pyramid()
        self._cues = store.nodes("cue", Cue) if config.build.told == "both" else []

    @classmethod
    def open(
        cls,
        folder: str | Path,
        checkpoint: str = "",
        helpers: Helpers | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> "Memory":
        """The memory in a folder.

        checkpoint: the model that answers (default: the one that built it, where it lay then), loaded at the first
        question; changes: keys of the config by their names with dots (`{"retrieve.gamma": 0.5}`). Raises
        FileNotFoundError if there is none, and ValueError for one that cannot be read.
        """
        store, changes = open_store(folder), dict(changes or {})
        image = {key: changes.pop(key) for key in [key for key in changes if key.startswith("image.")]}
        config = config_of(store, changes)
        return cls(store, config, helpers or Helpers.of(), lambda: _answering(store, config, checkpoint, image))

    @property
    def span(self) -> Span:
        """Of the whole video."""
        return Span(0.0, max((one.end for one in self.pyramid.segments), default=0.0))

    def ask(self, question: str, options: Sequence[str] = (), until: float | None = None) -> Answer:
        """An answer, with when the video shows it and how it was found.

        options: what it must be one of; until: the memory as it was at that time, in seconds. Raises ValueError for
        more options than there are letters, and for a checkpoint that is not there.
        """
        if self._model is None:
            self._model = self._make_model()
        return run(self.asked(question, options, until), self._model)

    def asked(self, question: str, options: Sequence[str] = (), until: float | None = None) -> Work[Answer]:
        """The same, for those who have questions answered side by side."""
        work = retrieve.answer(
            self._view(until), question, options, self.helpers.embedder, self.helpers.reranker, self.config.retrieve
        )
        return (yield from work)

    def _view(self, until: float | None) -> retrieve.Memory:
        config, build = self.config, self.config.build
        pyramid = self.pyramid if until is None else before(self.pyramid, until)
        span = self.span if until is None else Span(0.0, min(self.span.end, until))
        kept = [frame for one in pyramid.segments for frame in one.frames]

        def frames_of(within: Span, fps: float) -> tuple[Frame, ...]:
            return tuple(kept[n] for n in frames_at_times(within, [frame.time for frame in kept], fps).tolist())

        fps = build.schema_fps if build.whole else 0.0
        track = Track([cue for cue in self._cues if until is None or cue.start < until])
        if until is None and config.index == "concepts" and (concepts := self.store.concepts()):
            schema = Schema(config.schema)
            schema.concepts = concepts
            return retrieve.Memory(pyramid, schema, frames_of, span, fps, track)
        of_words = config.index == "words"
        made = retrieve.Memory.of(pyramid, frames_of, span, self.helpers.embedder, config.schema, of_words)
        return made._replace(schema_fps=fps, track=track)


def config_of(store: Store, changes: Mapping[str, Any] | None = None) -> AgentConfig:
    """The config that a memory was made with, with keys changed. Raises ConfigError for those that are none."""
    made = {key.removeprefix("config."): value for key, value in store.made.items() if key.startswith("config.")}
    return resolve(override(ConfigDict(), {**made, **(changes or {})}), "config")


def before(pyramid: Pyramid, time: float) -> Pyramid:
    """The memory as far as it tells nothing later: an episode that goes on is told by those of its segments that have
    ended, and nothing was extracted from it."""
    segments = [one for one in pyramid.segments if one.end <= time]
    captions = {one.number: one.caption for one in segments}
    episodes, extracted = [], {}
    for one in pyramid.episodes:
        known = tuple(n for n in one.segments if n in captions)
        if one.end <= time:
            extracted[one.number] = pyramid.extracted[one.number]
        elif known:
            end = max(other.end for other in segments if other.number in known)
            told = "\n".join(captions[n] for n in known)
            frames = tuple(frame for frame in one.frames if frame.time < end)
            one = dataclasses.replace(one, end=end, segments=known, caption=told, frames=frames)
            extracted[one.number] = {}
        else:
            continue
        episodes.append(one)
    return Pyramid(segments, episodes, extracted)


# --- the model --------------------------------------------------------------------------------------------------------


def _answering(store: Store, config: AgentConfig, checkpoint: str, image: Mapping[str, Any]) -> EngineModel:
    """The model of a checkpoint, or that which built the memory, as it was shown images then; `image`: with other keys
    of their config."""
    made = {} if checkpoint else store.made
    source = checkpoint or made.get("checkpoint", "")
    if not source:
        raise ValueError(f"{store.folder} does not say which model built it; give a checkpoint")
    model = load_model(source, adapter=made.get("adapter"))
    keys = override(ConfigDict({"image": made.get("image", {})}), image).image.to_dict()
    model = model.showing(keys, "config.image") if keys else model
    engine = engine_for(model, config, is_said=bool(store.counts()["cue"]))
    return EngineModel(engine, model.processor, finder([store.frames]), config.show)


def finder(folders: Sequence[FrameFiles]) -> Callable[[Frame], Image.Image]:
    """Finds frames wherever they are kept; names tell their content."""

    def image_of(frame: Frame) -> Image.Image:
        files = next((one for one in folders if one.path(frame.name).exists()), folders[-1])
        return files.image(frame.name)

    return image_of


def engine_for(model: LoadedModel, config: AgentConfig, rows: int = 1, is_said: bool = False) -> Engine:
    """An engine that has room for the calls of a config; `rows` are answered side by side, each with a cache of its
    own, of which a question needs one. `is_said`: whether there are subtitles.

    Frames are seen once for all calls, where memory and devices allow it.
    """
    generator, shape = model.generator(), room(model, config, rows, is_said)
    try:
        return Engine(generator, shape)
    except ValueError:
        if not shape.features:
            raise
        return Engine(generator, shape._replace(features=0))


def room(model: LoadedModel, config: AgentConfig, rows: int, is_said: bool = False) -> PoolShape:
    """What the largest calls need: as many frames as they may show, and texts of what is remembered; no more than the
    model was made for, to which longer calls are cut."""
    build, asked, show = config.build, config.retrieve, config.show
    side = config.ingest.side or UNLIMITED_SIDE
    blank = Image.new("RGB", (side, side))

    def shown(frames: int, most: int) -> tuple[int, int]:
        """Tokens and tiles of so many frames of `most` visual tokens."""
        processor = model.processor.limited(most)
        one, two = (processor.prompt([blank] * n, name="a frame") for n in (1, 2))
        tiles = max(len(one.pixels_ISSc), len(two.pixels_ISSc) - len(one.pixels_ISSc))
        return frames * (len(two.tokens_T) - len(one.tokens_T)), frames * tiles

    building = shown(max(build.images or UNLIMITED, build.manage.images), show.tokens)
    answering = shown(asked.images or UNLIMITED, show.answer_tokens)
    told = prompts.WORDS * (config.schema.kept + asked.episodes + asked.segments + 1)
    told += MOST * (asked.episodes + asked.segments + 1) * is_said
    tokens, tiles = map(max, building, answering)
    decoder = model.vlm.config.decoder
    longest = min(TEXT + told + tokens, math.inf if decoder.ntk_factor else decoder.max_positions)
    shape = PoolShape.of(rows, longest, tiles)
    return shape._replace(features=KEPT * shape.tiles)
