"""The demo's dataset on disk: mosaics as PNG files, conversations as JSONL, and the tokenizer.

FOLDER/images/train/*.png, images/heldout/*.png
FOLDER/reading.jsonl      one tile, to learn to read: transcriptions, rows, columns, cells
FOLDER/mixture.jsonl      all grids, one to four images
FOLDER/budget.jsonl       the same, in rows that hold the thumbnails alone, so that there is room for more questions
FOLDER/heldout.jsonl      as mixture, of digits that training never sees: the evaluation loss
FOLDER/heldout_budget.jsonl
FOLDER/questions.jsonl    a question a line about one cell, of the same held-out digits: the accuracy
FOLDER/tokenizer/
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from vlmem_jax import positions
from vlmem_jax.demo.mosaics import Digits, Mosaic, draw_mosaic, load_digits
from vlmem_jax.demo.questions import Kind, ask, conversation, fill
from vlmem_jax.demo.tokenizer import write_tokenizer

SIDE = 3
"""Digits, and visual tokens, along a side of a tile."""
Grid = tuple[int, int]
"""(columns, rows) of tiles."""
GRIDS: tuple[Grid, ...] = ((1, 1), (2, 1), (1, 2), (2, 2))
MIXTURE: tuple[tuple[int, Grid], ...] = (
    *[(1, (1, 1))] * 1,
    *[(1, (2, 1))] * 3,
    *[(1, (1, 2))] * 3,
    *[(1, (2, 2))] * 5,
    *[(images, (1, 1)) for images in (2, 3, 4)],
)
"""Images of a training sample and their grid, equally often; the larger a grid, the longer it takes to learn."""
UNTRAINED: tuple[int, Grid] = (4, (2, 1))
"""Longer than any training sample."""
GROUPS = (*dict.fromkeys(MIXTURE), UNTRAINED)
"""What held-out questions are asked about: images and their grid."""
OPENING_TOKENS = 3
"""Start token and the empty system turn."""
NAME_TOKENS = 3
"""An image's name and the control tokens round its visual tokens."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Sizes of the dataset."""

    reading_lines: int = 6400
    mixture_lines: int = 9600
    budget_lines: int = 9600
    tiles: int = 2400
    """Training images of one tile."""
    larger: int = 800
    """Training images of each larger grid."""
    reading_tokens: int = 112
    """Longest conversation in reading.jsonl, tokens."""
    mixture_tokens: int = 144
    """Longest conversation in mixture.jsonl, tokens."""
    budget_tokens: int = 112
    """Longest conversation in budget.jsonl, tokens."""
    heldout_lines: int = 96
    questions_each: int = 150
    """Held-out questions to each kind of single image, and to each number of images."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """A line of questions.jsonl: a question about one cell, and what is known about it."""

    images: tuple[str, ...]
    """Paths from the dataset's folder."""
    grid: Grid
    """Of every image."""
    image: int
    """The one that is asked about, from 0."""
    row: int
    column: int
    question: str
    answer: str

    @property
    def place(self) -> str:
        """Where the asked image stands among its like: first, middle or last."""
        if self.image == 0:
            return "first"
        return "last" if self.image == len(self.images) - 1 else "middle"


def grid_name(grid: Grid) -> str:
    """`2x1` for two columns and one row of tiles."""
    return f"{grid[0]}x{grid[1]}"


def write_dataset(folder: pathlib.Path, config: DatasetConfig) -> None:
    """Writes everything into `folder`. The same config gives the same pictures and lines."""
    train, heldout = load_digits()
    rng = np.random.default_rng(config.seed)
    write_tokenizer(folder / "tokenizer")
    counts = {grid: config.tiles if grid == (1, 1) else config.larger for grid in GRIDS}
    album = Album(folder, "train", train, counts, rng, SIDE)
    lines = (reading(rng, album, config.reading_tokens) for _ in range(config.reading_lines))
    write_lines(folder / "reading.jsonl", lines)

    def write(name: str, album: Album, lines: int, tokens: int, thumbnails: bool = False) -> None:
        mixed = (_mixed(rng, album, tokens, thumbnails) for _ in range(lines))
        write_lines(folder / f"{name}.jsonl", mixed)

    write("mixture", album, config.mixture_lines, config.mixture_tokens)
    write("budget", album, config.budget_lines, config.budget_tokens, thumbnails=True)
    album = Album(folder, "heldout", heldout, dict.fromkeys(GRIDS, 2 * config.questions_each), rng, SIDE)
    write("heldout", album, config.heldout_lines, config.mixture_tokens)
    write("heldout_budget", album, config.heldout_lines, config.budget_tokens, thumbnails=True)
    asked = (_ask(rng, album, *group, config.questions_each) for group in GROUPS)
    write_lines(folder / "questions.jsonl", itertools.chain.from_iterable(asked))


def read_questions(folder: pathlib.Path) -> list[Asked]:
    """The lines of questions.jsonl."""
    with (folder / "questions.jsonl").open(encoding="utf-8") as file:
        return [_asked(json.loads(line)) for line in file]


class Album:
    """Pictures of one pool of digits, on disk and in memory."""

    def __init__(
        self,
        folder: pathlib.Path,
        name: str,
        pool: Digits,
        counts: dict[Grid, int],
        rng: np.random.Generator,
        side: int,
    ):
        """`counts`: pictures by grid; `side`: digits along a side of a tile."""
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        self._pictures: dict[Grid, list[tuple[str, Mosaic]]] = {}
        for grid, count in counts.items():
            self._pictures[grid] = []
            for n in range(count):
                mosaic, path = draw_mosaic(rng, pool, grid, side), f"images/{name}/{grid_name(grid)}_{n:05}.png"
                mosaic.image.save(folder / path, compress_level=1)
                self._pictures[grid].append((path, mosaic))

    def pick(self, rng: np.random.Generator, grid: Grid, images: int) -> tuple[list[str], list[Mosaic]]:
        """Paths and mosaics of different pictures of this grid."""
        chosen = rng.choice(len(self._pictures[grid]), images, replace=False)
        paths, mosaics = zip(*(self._pictures[grid][n] for n in chosen), strict=True)
        return list(paths), list(mosaics)


def reading(rng: np.random.Generator, album: Album, tokens: int) -> dict[str, Any]:
    """A conversation of about `tokens` on one tile: what its digits are."""
    return _line(rng, *album.pick(rng, (1, 1), 1), ("all", "row", "column", "cell"), tokens)


def _mixed(rng: np.random.Generator, album: Album, tokens: int, thumbnails: bool) -> dict[str, Any]:
    images, grid = MIXTURE[int(rng.integers(len(MIXTURE)))]
    return _line(rng, *album.pick(rng, grid, images), ("row", "column", "cell", "cell"), tokens, thumbnails)


def _line(
    rng: np.random.Generator,
    paths: list[str],
    mosaics: list[Mosaic],
    kinds: Sequence[Kind],
    tokens: int,
    thumbnails: bool = False,
) -> dict[str, Any]:
    """A line of JSONL that asks these kinds of questions until it is `tokens` long, tiles or `thumbnails` alone among
    them."""
    seen = 0
    for mosaic in mosaics:
        tiles = 1 if thumbnails else positions.tile_count(*mosaic.grid)
        seen += NAME_TOKENS + tiles * mosaic.side**2
    questions = fill(rng, mosaics, kinds, tokens - OPENING_TOKENS - seen)
    return {"image": paths, "conversations": conversation(len(paths), questions)}


def _ask(rng: np.random.Generator, album: Album, images: int, grid: Grid, count: int) -> Iterator[dict[str, Any]]:
    for n in range(count):
        paths, mosaics = album.pick(rng, grid, images)
        asked = n % images  # every place equally often
        row, column = (int(rng.integers(size)) for size in mosaics[asked].digits_RC.shape)
        question = ask("cell", asked, mosaics[asked].digits_RC, row, column)
        yield {
            "image": paths,
            "conversations": conversation(images, [question]),
            "grid": list(grid),
            "asked": {"image": asked, "row": row, "column": column},
        }


def _asked(line: dict[str, Any]) -> Asked:
    question, answer = (turn["value"] for turn in line["conversations"])
    question = question.splitlines()[-1]  # the lines before show the images
    return Asked(tuple(line["image"]), tuple(line["grid"]), **line["asked"], question=question, answer=answer)


def write_lines(path: pathlib.Path, lines: Iterable[dict[str, Any]]) -> None:
    """A JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
