"""The programs that an engine can need, whatever is asked of it."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from vlmem_jax.generate.prompts import filled
from vlmem_jax.generate.rows import Plan, Row, prompt_text, settings
from vlmem_jax.generate.sampling import GREEDY
from vlmem_jax.generate.score import CONTINUATIONS
from vlmem_jax.generate.speaking import GROUPS
from vlmem_jax.types import Batch, Text

if TYPE_CHECKING:
    from vlmem_jax.generate.engine import Engine


def programs(engine: "Engine") -> dict[str, Callable[[], object]]:
    """What runs each program once, to no effect, by its name; no row of the pool may be running."""
    run = _Runs(engine)
    shape, tile = engine.shape, engine.generator.tile
    found: dict[str, Callable[[], object]] = {"step": run.step, "put": run.put, "get": run.get, "back": run.back}
    shown = {"": 0} | ({" with views": shape.tiles} if shape.tiles else {})
    for lanes in {engine.lanes, 1}:
        alone = "" if lanes == engine.lanes else " alone"
        for tiles in shape.tile_sizes(tile):
            found[f"see {tiles}{alone}"] = functools.partial(run.see, tiles, lanes)
        for how, tiles in shown.items():
            for tokens in shape.text_sizes:
                found[f"first {tokens}{how}{alone}"] = functools.partial(run.first, tokens, tiles, lanes)
            for tokens in shape.more_sizes:
                found[f"more {tokens}{how}{alone}"] = functools.partial(run.more, tokens, tiles, lanes)
    if engine.features:
        found["keep"] = run.keep
        for tiles in shape.tile_sizes(tile):
            found[f"show {tiles}"] = functools.partial(run.show, tiles)
    for tokens in shape.more_sizes:
        found[f"on {tokens}"] = functools.partial(run.on, tokens)
    for count in CONTINUATIONS:
        for tokens in engine._score.sizes:
            found[f"score {count} x {tokens}"] = functools.partial(run.score, count, tokens)
    for how, tiles in shown.items():
        found[f"labels{how}"] = functools.partial(run.labels, tiles)
    if engine.vlm.speech:
        found["insert"] = run.insert
        for rows in GROUPS:
            for size in run.speaking.sizes:
                found[f"form {rows} x {size}"] = functools.partial(run.form, rows, size)
    return found


class _Runs:
    def __init__(self, engine: "Engine"):
        self.engine, self.generator, self.speaking = engine, engine.generator, engine._speaking
        self.programs, self.params = engine._programs, engine.generator.params

    def see(self, tiles: int, lanes: int) -> object:
        views = filled([], lanes, self.generator.tile, 1, tiles).views
        with self.generator.context():
            return self.programs.see(self.params, self.generator.given(views, lanes))

    def keep(self) -> None:
        nowhere_I = np.full(self.engine.shape.tiles, self.engine.shape.features, np.int32)
        self.engine.features.keep(self.see(self.engine.shape.tiles, 1), nowhere_I)

    def show(self, tiles: int) -> object:
        return self.engine.features.of(filled([], 1, self.generator.tile, 1, tiles).views)

    def _text(self, tokens: int, lanes: int) -> Text:
        return prompt_text(Batch.empty((lanes,), tokens, 0, self.generator.tile).text)

    def first(self, tokens: int, tiles: int, lanes: int) -> tuple:
        visual = self.see(tiles, lanes) if tiles else None
        length_B = np.ones(lanes, np.int32)
        with self.generator.context():
            given = self.generator.given((self._text(tokens, lanes), length_B), lanes)
            return self.programs.first(self.params, given[0], visual, given[1])

    def more(self, tokens: int, tiles: int, lanes: int, text: Text | None = None) -> tuple:
        visual = self.see(tiles, lanes) if tiles else None
        logits_BV, decode = self.first(self.engine.shape.text_sizes[0], 0, lanes)
        text = self.generator.given(self._text(tokens, lanes) if text is None else text, lanes)
        with self.generator.context():
            return self.programs.more(self.params, decode, logits_BV, text, visual, np.int32(1))

    def on(self, tokens: int) -> tuple:
        text = self._text(tokens, 1)
        return self.more(tokens, 0, 1, Text(text.tokens_BT, text.segments_BT))

    def put(self) -> None:
        logits_BV, decode = self.first(self.engine.shape.text_sizes[0], 0, self.engine.lanes)
        own = settings(self.engine.vlm, self.engine.shape)
        with self.generator.context():
            rows = self.programs.put(self.engine._rows, decode, logits_BV, own, np.int32(0), np.int32(0))
            self.engine._rows = rows

    def back(self) -> None:
        row = self.get()
        with self.generator.context():
            self.engine._rows = self.programs.back(self.engine._rows, row, np.int32(0))

    def get(self) -> Row:
        return self.engine._get(0)

    def step(self) -> None:
        plan = Plan(np.int32(GREEDY), np.int32(1))
        with self.generator.context():
            self.engine._rows, *_ = self.programs.step(self.params, self.engine._rows, self.engine._delimiter_V, plan)

    def score(self, count: int, tokens: int) -> object:
        return self.engine._score.run(self.get(), np.zeros((count, tokens), np.int32), np.int32(1))

    def labels(self, tiles: int) -> object:
        return self.engine._score.read([], [0], tiles)

    def form(self, rows: int, size: int) -> None:
        nobody = np.full(rows, self.engine.shape.slots, np.int32)
        self.speaking.form(self.engine._rows, nobody, np.full_like(nobody, -1), size)

    def insert(self) -> None:
        kinds_B = np.full(self.engine.shape.slots, -1, np.int32)
        self.engine._rows = self.speaking.insert(self.engine._rows, kinds_B, np.int32(1))
