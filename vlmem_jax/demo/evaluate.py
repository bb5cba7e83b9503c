"""Accuracy on held-out questions, through the framework's own generation."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmem_jax.demo.dataset import GRIDS, UNTRAINED, Asked, grid_name
from vlmem_jax.demo.questions import opening
from vlmem_jax.generate import LoadedModel, SamplingConfig, answers
from vlmem_jax.models import VLM
from vlmem_jax.models.flops import prefill_flops
from vlmem_jax.processing.images import open_image
from vlmem_jax.types import Batch, Sample, TileShape

CHANCE = 0.1
"""Of guessing one of ten digits."""
BATCH = 100
LONGEST_ANSWER = 4
"""Tokens; a right answer is one digit."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A question and what the model said."""

    asked: Asked
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.asked.answer


def prompt(model: LoadedModel, dataset: Path, asked: Asked) -> Sample:
    """The question as the model reads it."""
    return model.processor.prompt([*opening([open_image(dataset / path) for path in asked.images]), asked.question])


def answer(model: LoadedModel, samples: Sequence[Sample]) -> list[str]:
    """The model's most probable answer to each prompt."""
    ids = answers(model.generator(), samples, SamplingConfig(max_new_tokens=LONGEST_ANSWER), BATCH)
    return [model.processor.tokenizer.decode(one).strip() for one in ids]


def ask_all(model: LoadedModel, dataset: Path, questions: Sequence[Asked]) -> list[Answered]:
    """Answers to held-out questions."""
    order = np.random.default_rng(0).permutation(len(questions))  # batches of one mixture have one shape to compile
    texts = answer(model, [prompt(model, dataset, questions[n]) for n in order])
    said = dict(zip(order.tolist(), texts, strict=True))
    return [Answered(asked, said[n]) for n, asked in enumerate(questions)]


def cost(model: LoadedModel, dataset: Path, questions: Sequence[Asked]) -> dict[str, float]:
    """The cost of reading a question about one image, mean over the grids: visual `tokens` in its sequence, `flops`,
    and `kv_bytes` that are kept while it is answered, those of the memory among them."""
    found = []
    for grid in GRIDS:
        asked = next(one for one in questions if len(one.images) == 1 and one.grid == grid)
        sample = prompt(model, dataset, asked)
        length, tiles = len(sample.tokens_T), len(sample.pixels_ISSc)
        flops = prefill_flops(model.vlm.config, 1, length, tiles)
        kept = _kept_bytes(model.vlm, length, tiles, model.processor.tile)
        found.append((int((sample.visual_index_T >= 0).sum()), flops, kept))
    return dict(zip(("tokens", "flops", "kv_bytes"), np.mean(found, axis=0).tolist(), strict=True))


@functools.cache  # a comparison asks models of one kind, which differ by their parameters alone
def _kept_bytes(vlm: VLM, length: int, tiles: int, tile: TileShape) -> int:
    """Bytes of what is kept of a prompt of so many tokens, and of the memory that reads its tiles."""
    batch = Batch.empty((1,), length, tiles, tile)
    _, state = jax.eval_shape(functools.partial(vlm.prefill, capacity=length), vlm.abstract(), batch)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.cache, state.memory)))


def tally(answered: Sequence[Answered]) -> dict[str, Any]:
    """[right answers, questions] by kind of question, some kinds in groups."""

    def count(keep: Callable[[Asked], bool]) -> list[int]:
        kept = [one.right for one in answered if keep(one.asked)]
        return [sum(kept), len(kept)]

    def trained(asked: Asked) -> bool:
        return (len(asked.images), asked.grid) != UNTRAINED

    def several(asked: Asked) -> bool:
        return len(asked.images) > 1 and trained(asked)

    def tiles(asked: Asked, images: int) -> bool:
        return len(asked.images) == images and asked.grid == (1, 1)

    return {
        "single_image": count(lambda asked: len(asked.images) == 1),
        "multi_image": count(several),
        "by_position": {
            place: count(lambda asked, place=place: several(asked) and asked.place == place)
            for place in ("first", "middle", "last")
        },
        "by_grid": {
            grid_name(grid): count(lambda asked, grid=grid: len(asked.images) == 1 and asked.grid == grid)
            for grid in GRIDS
        },
        "by_images": {str(n): count(lambda asked, n=n: tiles(asked, n)) for n in range(1, 5)},
        "by_place_of_four": {
            str(n + 1): count(lambda asked, n=n: tiles(asked, 4) and asked.image == n) for n in range(4)
        },
        "untrained_length": count(lambda asked: not trained(asked)),
    }


def accuracies(tallies: Any) -> Any:
    """The same groups with shares of right answers; None where nothing was asked."""
    if isinstance(tallies, dict):
        return {kind: accuracies(inner) for kind, inner in tallies.items()}
    right, asked = tallies
    return right / asked if asked else None


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    if not asked:
        return 0.0, 1.0
    p, z = right / asked, 1.96
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(p * (1 - p) / asked + z * z / (4 * asked * asked))
    return middle - half, middle + half
