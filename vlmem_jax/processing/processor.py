"""A conversation and what it shows to a Sample: the one place where placeholders are expanded and counted."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vlmem_jax.processing import chat
from vlmem_jax.processing.context import Context
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.processing.video import Clip, Video, VideoSize, probe, read_frames
from vlmem_jax.types import IGNORED, Geometry, Sample, TileShape

Conversation = Any
"""A list of {`from`: human | gpt, `value`: text}, as JSON gives it: checked here, not by its type."""
ImageSize = tuple[int, int]
"""Width and height, pixels."""


class SampleSize(NamedTuple):
    """Sizes of a training sample, known without decoding its images."""

    tokens: int
    tiles: int
    """Tiles that the vision tower sees, thumbnails and a blank tile included."""
    targets: int
    """Tokens that the loss counts."""


class Placed(NamedTuple):
    """Where the tokens of a sample stand, and what becomes of its visual tokens: C of them stand in the sequence."""

    positions_T: np.ndarray
    slot_C: np.ndarray
    """Which visual token each placeholder stands for, or which mean."""
    visual_positions_M: np.ndarray
    layout_I4: np.ndarray | None = None
    pool_M: np.ndarray | None = None
    """As in `Sample`."""


class GeometryOf(Protocol):
    """What a model of geometry makes of the tiles of an image or video, uint8 [I, S, S, c], in the order of time."""

    digest: str
    """Tells it from others."""

    def __call__(self, pixels_ISSc: UInt8[np.ndarray, "I S S c"]) -> Geometry: ...


class Processor:
    """Makes samples for a model; a subclass a way of seeing, see `TileProcessor` and `PatchProcessor`.

    `system` replaces the template's system text. `whole`: whether something reads what does not stand in the sequence;
    if not, it is not seen at all. Every error names the sample, as far as the caller gives a `name`.
    """

    tile: TileShape
    """What the model's tower takes at a time."""
    image: Any
    """The config of images, a dataclass."""
    open_limit: int
    """Pixels of the largest image or video frame that may be opened."""
    size_knobs: tuple[str, str]
    """Keys that bound the tiles of a sample of images, and of a video."""
    video_is_whole: bool = False
    """Whether a video has one placeholder, where it has that of an image: else each of its frames has one."""
    geometry_of: "GeometryOf | None" = None
    """Makes the geometry of what is shown, where a memory reads it. None: others give it to samples, as from a
    store."""

    def __init__(self, tokenizer: Tokenizer, system: str | None, template: str, context: Context, whole: bool):
        self.tokenizer = tokenizer
        self.context, self.whole = context, whole
        self.system = system
        self.template = chat.template(template)
        ids = {token: _control_id(tokenizer, token) for token in self.template.control_tokens}
        self._start_id, self.stop_id = ids[self.template.start], ids[self.template.end]
        """stop_id ends an answer."""
        self.stop_ids = (self.stop_id, *map(tokenizer.id, self.template.stops))
        """Any of them ends a generated answer."""
        self.context_id = ids[self.template.image[1]]
        """The placeholder of one visual token of an image."""
        self.video_id = ids[self.template.video[1]] if self.template.video else self.context_id
        inputs = {tokenizer.pad_id, *ids.values()} - {self._start_id, *self.stop_ids}
        self.control_ids = tuple(sorted(inputs))
        """Ids that a model must never generate: they have a meaning as input only."""
        self._control = ids
        self._encode_text = tokenizer.text_encoder((*ids, *self.template.stops))
        self._answer_start = self._encode(self.template.answer_start)
        probe = [chat.Control(self.template.start), " a ", chat.Control(self.template.end)]
        if (whole := tokenizer.encode("".join(probe))) != self._encode(probe):
            raise ValueError(
                f"text between control tokens must be tokenised as if alone, but the tokenizer in {tokenizer.folder} "
                f"makes {whole} of {''.join(probe)!r}, not {self._encode(probe)}; set lstrip and rstrip of its added "
                "tokens to false, and let it put a prefix before each such text or before none"
            )
        if self.template.bos and tokenizer.bos_id is None:
            raise ValueError(
                f"the template {template} begins with a start token, but the tokenizer in {tokenizer.folder} has none; "
                "name it in tokenizer_config.json (bos_token)"
            )

    def plan(
        self,
        conversations: Conversation,
        image_sizes: Sequence[ImageSize] = (),
        video_sizes: Sequence[VideoSize] = (),
        *,
        mask_text_only: bool = False,
        name: str = "",
    ) -> SampleSize:
        """Sizes of what `encode` gives for images and videos of these sizes; raises what `encode` raises."""
        with naming(name):
            dialogue = self._read(conversations, image_sizes, video_sizes)
            shown = dialogue.shown
            ids, targets = self._training_text(dialogue)
            grids = self._grids(shown, training=True)
            blank = not shown and not mask_text_only
            length = len(ids) - len(shown) + sum(map(self._placeholders, grids))
            return SampleSize(length, sum(map(self._tiles, grids)) + blank, int(targets.sum()))

    def encode(
        self,
        conversations: Conversation,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        *,
        mask_text_only: bool = False,
        name: str = "",
    ) -> Sample:
        """A training sample: answers and the tokens that close them are targets (CoMemo sec. 4).

        Without images and videos the sample gets a blank tile that no token stands for, or none with `mask_text_only`.
        Raises ValueError for a conversation or images that do not fit.
        """
        with naming(name):
            dialogue = self._read(conversations, images, videos)
            shown = dialogue.shown
            ids, targets = self._training_text(dialogue)
            sample = self._sample(ids, targets, shown, self._grids(shown, training=True), None, name)
        if shown or mask_text_only:
            return sample
        return dataclasses.replace(sample, **blank_tiles(1, self.tile))

    def message(
        self, text: str | chat.Message, images: Sequence[Image.Image] = (), videos: Sequence[Video] = ()
    ) -> chat.Message:
        """A message that shows images and videos before its text, set apart as the template does it."""
        return chat.message(text, images, videos, self.template.before_text)

    def prompt(
        self,
        question: str | chat.Message,
        images: Sequence[Image.Image] = (),
        history: Sequence[tuple[str | chat.Message, str]] = (),
        *,
        videos: Sequence[Video] = (),
        rope_dhr: bool | None = None,
        system: str | None = None,
        name: str = "",
    ) -> Sample:
        """A prompt to be answered, after a `history` of (question, answer) pairs; no token is a target.

        A question is a text, or a list of texts, images and videos in the order in which they stand; `images` and
        `videos` stand before the last one. Whatever a text holds, it is text. `rope_dhr` and `system` replace the
        config's here. Without images there are no tiles. Raises ValueError for images that do not fit (CoMemo sec. 3).
        """
        with naming(name):
            turns = [said for asked, answer in history for said in (chat.message(asked), (answer,))]
            dialogue = chat.Dialogue((*turns, self.message(question, images, videos)), system)
            dialogue = self._laid_out(dialogue)
            ids = self._ids(dialogue)
            grids = self._grids(dialogue.shown, training=False)
            return self._sample(ids, np.zeros(len(ids), bool), dialogue.shown, grids, rope_dhr, name)

    def recalled(
        self, question: str | chat.Message, video: VideoSize, *, rope_dhr: bool | None = None, name: str = ""
    ) -> Sample:
        """As `prompt`, about a video whose visual tokens were made before: without tiles."""
        with naming(name):
            dialogue = self._laid_out(chat.Dialogue((self.message(question, videos=[video]),)))
            ids = self._ids(dialogue)
            grids = self._grids(dialogue.shown, training=False)
            return self._sample(ids, np.zeros(len(ids), bool), dialogue.shown, grids, rope_dhr, name, cut=False)

    def limited(self, tokens: int) -> "Processor":
        """The same, for whose images at most so many visual tokens stand in a prompt, where their number depends on
        their size; 0: as many as there are."""
        return self

    def frame(self, picture: Image.Image) -> UInt8[np.ndarray, "S S c"]:
        """A frame of a video as the tile that it is, where each is one."""
        [shown] = self._laid_out(chat.Dialogue(((Video([picture]),),))).shown
        tile_ISSc = np.empty((1, self.tile.side, self.tile.side, self.tile.channels), np.uint8)
        self._cut(shown, self._grids([shown], training=False)[0], tile_ISSc)
        return tile_ISSc[0]

    def raw_prompt(
        self,
        text: str,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Video] = (),
        *,
        rope_dhr: bool | None = None,
        name: str = "",
    ) -> Sample:
        """A prompt that is written out: no template, and one placeholder for each image and video, in their order.

        `rope_dhr` as in `prompt`. Raises ValueError where the numbers differ.
        """
        with naming(name):
            ids = np.array(self.tokenizer.encode(text), np.int32)
            given_of = {self.video_id: videos, self.context_id: images}
            if self.video_id == self.context_id:
                if videos and not self.video_is_whole:
                    raise ValueError("a raw prompt for this model cannot show videos; leave prompt_is_raw out")
                if videos and images:
                    raise ValueError("a raw prompt for this model shows images or videos, not both; leave one out")
                given_of = {self.context_id: videos or images}
            for placeholder, given in given_of.items():
                held = int((ids == placeholder).sum())
                if held != len(given):
                    token = self.tokenizer.decode([placeholder], skip_special=False)
                    raise ValueError(
                        f"a raw prompt must hold a placeholder for each image or video, but this one holds {held} "
                        f"{token} for {len(given)}"
                    )
            left = {placeholder: iter(given) for placeholder, given in given_of.items()}
            shown = [next(left[i]) for i in ids.tolist() if i in left]
            grids = self._grids(shown, training=False)
            return self._sample(ids, np.zeros(len(ids), bool), shown, grids, rope_dhr, name)

    def answer(self, text: str) -> list[int]:
        """Ids of an answer to learn and the token that closes it. Raises ValueError if it holds a control token."""
        chat.check_text(text, self.template)
        return [*self._encode([text]), self.stop_id]

    def follow_up(
        self, question: str | chat.Message, images: Sequence[Image.Image] = (), *, rope_dhr: bool | None = None
    ) -> Sample:
        """What goes on from an answer without its closing token to the start of the next answer.

        Positions and visual tokens count from 0. The rest as in `prompt`.
        """
        template = self.template
        dialogue = self._laid_out(chat.Dialogue((self.message(question, images),)))
        turn = template.turn(template.user, dialogue.messages[0])
        pieces = [chat.Control(template.end), template.after_turn, *turn, *template.answer_start]
        ids = np.array(self._encode(pieces), np.int32)
        grids = self._grids(dialogue.shown, training=False)
        return self._sample(ids, np.zeros(len(ids), bool), dialogue.shown, grids, rope_dhr, "follow-up")

    def choose_frames(
        self, clip: Clip, minimum: int = 4, maximum: int = 24, rng: np.random.Generator | None = None
    ) -> list[int]:
        """Which frames to take of a video; where the family leaves the number open, `minimum` to `maximum`."""
        raise NotImplementedError

    def open_video(
        self,
        path: str | os.PathLike,
        *,
        fps: float | None = None,
        frames: int | None = None,
        start: float = 0.0,
        end: float | None = None,
    ) -> tuple[Video, list[int]]:
        """The frames of a video file that `choose_frames` takes, and which they are.

        With `fps`, so many of each second, or with `frames`, so many in all, evenly spaced; with `start` and `end`,
        of that part of it, in seconds. Raises ValueError naming the file if it cannot be read, has too few frames, or
        no such part.
        """
        whole = probe(path)
        try:
            first, clip = whole.window(start, end) if start or end is not None else (0, whole)
            if frames is not None:
                if clip.frames < frames:
                    raise ValueError(f"a video must have the {frames} frames asked for, but it has {clip.frames}")
                chosen = self.spread(clip, frames)
            else:
                chosen = self.choose_frames(clip) if fps is None else self.frames_at(clip, fps)
            within = clip.at(chosen)
        except ValueError as error:
            raise ValueError(f"{error} ({path})") from error
        chosen = [first + place for place in within]
        video = whole.video(read_frames(path, chosen, self.open_limit, self.image), chosen)
        return dataclasses.replace(video, seconds=clip.seconds(within)), chosen

    def spread(self, clip: Clip, count: int) -> list[int]:
        """`count` frames of a video, evenly spaced."""
        return np.linspace(0, clip.frames - 1, count).round().astype(int).tolist()

    def told(self, video: Video) -> str:
        """What is worth a line of how a video that was read is shown."""
        return f"{video.seconds:.3f} s apart"

    def frames_at(self, clip: Clip, fps: float) -> list[int]:
        """Which frames to take of a video so that there are `fps` of each second."""
        count = min(max(round(clip.frames / clip.fps * fps), 1), clip.frames)
        return self.choose_frames(clip, count, count)

    # what the families do in their own ways

    def _laid_out(self, dialogue: chat.Dialogue) -> chat.Dialogue:
        """The dialogue as it is written out: each part that it shows is one placeholder."""
        return dialogue

    def _grids(self, shown: Sequence, training: bool) -> list:
        """How each of `shown` is cut."""
        raise NotImplementedError

    def _tiles(self, grid: Any) -> int:
        """Tiles of a grid."""
        raise NotImplementedError

    def _placeholders(self, grid: Any) -> int:
        """Tokens of the sequence that stand for what a grid shows."""
        raise NotImplementedError

    def _place(self, tokens_T: np.ndarray, grids: Sequence, rope_dhr: bool | None) -> Placed:
        """Raises ValueError where placeholders do not fit what is shown."""
        raise NotImplementedError

    def _cut(self, picture: Image.Image | Video, grid: Any, out_ISSc: np.ndarray) -> None:
        """Writes the tiles of one of `shown`."""
        raise NotImplementedError

    # what they share

    def _read(self, conversations: Conversation, images: Sequence, videos: Sequence) -> chat.Dialogue:
        dialogue = chat.read_conversation(conversations, images, videos, self.template.before_text)
        for text in (dialogue.system or "", *(part for one in dialogue.messages for part in one)):
            if isinstance(text, str):
                chat.check_text(text, self.template)
        return self._laid_out(dialogue)

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        """Ids of pieces of a prompt. Texts between control tokens are tokenised together, and never become one."""
        ids: list[int] = []
        for is_control, run in itertools.groupby(pieces, lambda piece: isinstance(piece, chat.Control)):
            together = list(run)
            ids += [self._control[token] for token in together] if is_control else self._encode_whole("".join(together))
        return ids

    def _encode_whole(self, text: str) -> list[int]:
        try:
            return self._encode_text(text)
        except TypeError as error:  # what no encoding has, such as an argument of the command line that is no UTF-8
            raise ValueError(f"a text must be Unicode, but has what is not: {text[:60]!a}") from error

    def _ids(self, dialogue: chat.Dialogue) -> np.ndarray:
        """Ids of the prompt with one placeholder for all that it shows."""
        ids = self._encode(chat.render(dialogue, self.template, self.system))
        return np.array([self.tokenizer.bos_id, *ids] if self.template.bos else ids, np.int32)

    def _training_text(self, dialogue: chat.Dialogue) -> tuple[np.ndarray, np.ndarray]:
        """`_ids` of a conversation and which of them are targets."""
        ids = self._ids(dialogue)
        targets = np.zeros(len(ids), bool)
        starts, ends = np.flatnonzero(ids == self._start_id), np.flatnonzero(ids == self.stop_id)
        first = len(starts) - len(dialogue.messages) + 1  # turns: perhaps system, user, assistant, user, ...
        learned = dialogue.learned or (True,) * len(starts[first::2])
        turns = zip(starts[first::2], ends[first::2], learned, strict=True)
        for start, end, is_learned in turns:
            answer = start + len(self._answer_start)
            if ids[start:answer].tolist() != self._answer_start:
                opening = "".join(self.template.answer_start)
                raise ValueError(
                    f"the tokenizer joins the start of an answer to the text before it ({opening!r} "
                    f"should be ids {self._answer_start}, got {ids[start:answer].tolist()}), so its targets are unknown"
                )
            targets[start if self.template.learned else answer : end + 1] = is_learned
        everywhere = [self._control.get(token) or self._encode([token])[0] for token in self.template.learned]
        return ids, targets | np.isin(ids, everywhere)

    def _sample(
        self,
        ids: np.ndarray,
        targets: np.ndarray,
        shown: Sequence[Any],
        grids: Sequence[Any],
        rope_dhr: bool | None,
        name: str,
        cut: bool = True,
    ) -> Sample:
        """Expands placeholders, checks them against the features, and cuts the tiles, if there are to be any."""
        counts = [self._tiles(grid) * cut for grid in grids]
        placeholders = self.context_id, self.video_id
        repeats = np.ones(len(ids), np.int64)
        repeats[np.isin(ids, placeholders)] = [self._placeholders(grid) for grid in grids]
        tokens_T = np.repeat(ids, repeats)
        placed = self._place(tokens_T, grids, rope_dhr)
        visual_index_T = np.full(len(tokens_T), -1, np.int32)
        visual_index_T[np.isin(tokens_T, placeholders)] = placed.slot_C
        shape = self.tile.side, self.tile.side, self.tile.channels
        pixels_ISSc = np.empty((sum(counts), *shape), np.uint8)
        reads = self.tile.geometry if self.geometry_of and cut else None
        geometry = Geometry.empty((sum(counts),), reads) if reads else None
        for picture, grid, count, end in zip(shown, grids, counts, np.cumsum(counts), strict=True) if cut else ():
            tiles = slice(end - count, end)
            self._cut(picture, grid, pixels_ISSc[tiles])
            if geometry is not None:
                geometry.put(tiles, self.geometry_of(pixels_ISSc[tiles]))
        return Sample(
            tokens_T=tokens_T,
            labels_T=np.repeat(np.where(targets, ids, np.int32(IGNORED)), repeats),
            positions_T=placed.positions_T,
            visual_index_T=visual_index_T,
            pixels_ISSc=pixels_ISSc,
            visual_positions_M=placed.visual_positions_M if cut else placed.visual_positions_M[:0],
            layout_I4=placed.layout_I4,
            pool_M=placed.pool_M,
            geometry=geometry,
            name=name,
        )


def blank_tiles(count: int, tile: TileShape) -> dict[str, np.ndarray]:
    """Fields of a Sample with `count` white tiles that no token stands for and that see nothing of each other."""
    positions_M, alone_I = np.arange(count * tile.tokens, dtype=np.int32), np.arange(1, count + 1, dtype=np.int32)
    fields = {
        "pixels_ISSc": np.full((count, tile.side, tile.side, tile.channels), 255, np.uint8),
        "visual_positions_M": positions_M if tile.axes == 1 else np.stack([positions_M] * tile.axes, axis=1),
    }
    if tile.layout:
        fields["layout_I4"] = np.stack([alone_I, alone_I, 0 * alone_I, 0 * alone_I], axis=1)
    if tile.pooled:
        fields["pool_M"] = positions_M
    if tile.geometry:
        fields["geometry"] = Geometry.empty((count,), tile.geometry)
    return fields


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.id(token)
    if tokenizer.encode(token) != [found]:
        raise ValueError(
            f"control token {token} must be one id, but the tokenizer in {tokenizer.folder} splits it into "
            f"{tokenizer.encode(token)}; mark it as an added token there"
        )
    return found


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Makes any exception of a sample a ValueError that names it; running out of memory is no sample's fault."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{error} (sample {name})") from error
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}{f' (sample {name})' if name else ''}") from error
