"""A conversation and its images to a Sample: the one place where image placeholders are expanded and counted."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmem_jax import positions
from vlmem_jax.processing import chat
from vlmem_jax.processing.images import ImageConfig, tile_grid, write_tiles
from vlmem_jax.processing.tokenizer import Tokenizer
from vlmem_jax.types import IGNORED, Sample

Conversation = Any
"""A list of {`from`: human | gpt, `value`: text}, as JSON gives it: checked here, not by its type."""
Grid = tuple[int, int]


class Plan(NamedTuple):
    """Sizes of a training sample, known without decoding its images."""

    tokens: int
    tiles: int
    """Tiles that the vision tower sees, thumbnails and a blank tile included."""
    targets: int
    """Tokens that the loss counts."""


class Processor:
    """Makes samples for a model that sees a tile as `tokens_per_side`**2 visual tokens.

    `system` replaces the template's system text. Every error names the sample, as far as the caller gives a `name`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image: ImageConfig,
        tokens_per_side: int,
        system: str | None = None,
        template: str = "internlm2-chat",
    ):
        self.tokenizer = tokenizer
        self.image = image
        self.tokens_per_side = tokens_per_side
        self.system = system
        self.template = chat.template(template)
        start, end, *image_tokens = (_control_id(tokenizer, token) for token in self.template.control_tokens)
        self._start_id = start
        self.stop_id = end
        """Ends an answer."""
        self.context_id = image_tokens[-1]
        """The placeholder of one visual token."""
        self.control_ids = tuple(sorted({*image_tokens, tokenizer.pad_id} - {end}))
        """Ids that a model must never generate: they have a meaning as input only."""
        self._answer_start = tokenizer.encode(self.template.answer_start)

    def plan(
        self,
        conversations: Conversation,
        image_sizes: Sequence[tuple[int, int]] = (),
        *,
        video: bool = False,
        mask_text_only: bool = False,
        name: str = "",
    ) -> Plan:
        """Sizes of what `encode` gives for images of these (width, height) in pixels; raises what `encode` raises."""
        with _naming(name):
            ids, targets = self._training_text(conversations, len(image_sizes), video)
            tiles = sum(self._tile_counts(self._training_grids(image_sizes, video)))
            length = len(ids) - len(image_sizes) + tiles * self.tokens_per_side**2
            blank = not image_sizes and not mask_text_only
            return Plan(length, tiles + blank, int(targets.sum()))

    def encode(
        self,
        conversations: Conversation,
        images: Sequence[Image.Image] = (),
        *,
        video: bool = False,
        mask_text_only: bool = False,
        name: str = "",
    ) -> Sample:
        """A training sample: answers and the tokens that close them are targets (CoMemo sec. 4).

        Images share `image.max_tiles`; with `video` they are frames of one tile each. Without images the sample gets
        a blank tile that no token stands for, or none with `mask_text_only`. Raises ValueError for a conversation or
        images that do not fit.
        """
        with _naming(name):
            ids, targets = self._training_text(conversations, len(images), video)
            grids = self._training_grids([image.size for image in images], video)
            sample = self._sample(ids, targets, images, grids, self.image.rope_dhr, name)
        if images or mask_text_only:
            return sample
        size, slots = self.image.size, np.arange(self.tokens_per_side**2, dtype=np.int32)
        blank_ISSc = np.full((1, size, size, 3), 255, np.uint8)
        return dataclasses.replace(sample, pixels_ISSc=blank_ISSc, memory_positions_M=slots)

    def prompt(
        self,
        question: str,
        images: Sequence[Image.Image] = (),
        history: Sequence[tuple[str, str]] = (),
        *,
        rope_dhr: bool | None = None,
        video: bool = False,
        name: str = "",
    ) -> Sample:
        """A prompt to be answered, after a `history` of (question, answer) pairs; no token is a target.

        `images` are those of all turns in order, each of up to `image.max_tiles`; where there is no history, those
        that the question does not mark stand before it. With `video` they are frames of one tile each. `rope_dhr`
        replaces the config's for this call. Without images there are no tiles. Raises ValueError for texts or images
        that do not fit (CoMemo sec. 3).
        """
        with _naming(name):
            ids = self._ids(chat.read_question(question, len(images), history, video))
            grids = [tile_grid(*image.size, self.image, max_tiles=1 if video else None) for image in images]
            rope_dhr = self.image.rope_dhr if rope_dhr is None else rope_dhr
            return self._sample(ids, np.zeros(len(ids), bool), images, grids, rope_dhr, name)

    def follow_up(self, question: str) -> list[int]:
        """Ids that go on from an answer without its closing token to the start of the next answer.

        Raises ValueError if the question holds a control token or an image marker.
        """
        template = self.template
        with _naming("follow-up question"):
            dialogue = chat.read_question(question)
            chat.check_text(dialogue, template)
            text = f"{template.start}{template.user}\n{question}{template.end}{template.answer_start}"
            return [self.stop_id, *self.tokenizer.encode(text)]

    def _ids(self, dialogue: chat.Dialogue) -> np.ndarray:
        """Ids of the prompt with one placeholder for each image. The text is tokenised once and whole."""
        chat.check_text(dialogue, self.template)
        text = chat.render(dialogue, self.template, self.system)
        return np.array([self.tokenizer.bos_id, *self.tokenizer.encode(text)], np.int32)

    def _training_text(self, conversations: Conversation, images: int, video: bool) -> tuple[np.ndarray, np.ndarray]:
        """`_ids` of a conversation and which of them are targets."""
        ids = self._ids(chat.read_conversation(conversations, images, video))
        targets = np.zeros(len(ids), bool)
        starts, ends = np.flatnonzero(ids == self._start_id), np.flatnonzero(ids == self.stop_id)
        for start, end in zip(starts[2::2], ends[2::2], strict=True):  # turns: system, user, assistant, user, ...
            answer = start + len(self._answer_start)
            if ids[start:answer].tolist() != self._answer_start:
                raise ValueError(
                    f"the tokenizer joins the start of an answer to the text before it ({self.template.answer_start!r} "
                    f"should be ids {self._answer_start}, got {ids[start:answer].tolist()}), so its targets are unknown"
                )
            targets[answer : end + 1] = True
        return ids, targets

    def _training_grids(self, image_sizes: Sequence[tuple[int, int]], video: bool) -> list[Grid]:
        share = 1 if video else self.image.max_tiles // max(len(image_sizes), 1)
        return [tile_grid(width, height, self.image, share) for width, height in image_sizes]

    def _tile_counts(self, grids: Sequence[Grid]) -> list[int]:
        return [positions.tile_count(cols, rows, self.image.thumbnail) for cols, rows in grids]

    def _sample(
        self,
        ids: np.ndarray,
        targets: np.ndarray,
        images: Sequence[Image.Image],
        grids: Sequence[Grid],
        rope_dhr: bool,
        name: str,
    ) -> Sample:
        """Expands placeholders, checks them against the images' features, and cuts the tiles."""
        config, side, counts = self.image, self.tokens_per_side, self._tile_counts(grids)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == self.context_id] = np.multiply(counts, side * side)
        tokens_T = np.repeat(ids, repeats)
        labels_T = np.repeat(np.where(targets, ids, np.int32(IGNORED)), repeats)
        positions_T, memory_positions_M = positions.sequence_positions(
            tokens_T, grids, side, self.context_id, rope_dhr, config.dhr_map, config.thumbnail
        )
        slots_T = np.full(len(tokens_T), -1, np.int32)
        slots_T[tokens_T == self.context_id] = np.arange(len(memory_positions_M), dtype=np.int32)
        pixels_ISSc = np.empty((sum(counts), config.size, config.size, 3), np.uint8)
        last = np.cumsum(counts)
        for image, grid, count, end in zip(images, grids, counts, last, strict=True):
            write_tiles(image, grid, pixels_ISSc[end - count : end])
        return Sample(tokens_T, labels_T, positions_T, slots_T, pixels_ISSc, memory_positions_M, name)


def _control_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.id(token)
    if tokenizer.encode(token) != [found]:
        raise ValueError(
            f"control token {token} must be one id, but the tokenizer in {tokenizer.folder} splits it into "
            f"{tokenizer.encode(token)}; mark it as an added token there"
        )
    return found


@contextlib.contextmanager
def _naming(name: str):
    """Adds the sample's name to a ValueError."""
    try:
        yield
    except ValueError as error:
        if not name:
            raise
        raise ValueError(f"{error} (sample {name})") from error
