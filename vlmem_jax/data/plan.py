"""The pack plan: which samples share a row, from sizes alone. Row after row it is a function of files and seed."""

import array
import dataclasses
import io
import itertools
import json
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from vlmem_jax.data.config import DataConfig
from vlmem_jax.data.rows import sample_weight
from vlmem_jax.data.samples import Key, Samples
from vlmem_jax.processing import Processor
from vlmem_jax.processing.media import cut

MEASURED_AT_ONCE = 1024
"""Samples that the threads of a host measure before they are packed."""
SKIP_HINT = "data.on_bad_sample=skip leaves out what cannot be used"
KEYS_NAMED = 8
"""Keys that are not read which the report names."""
SKIPPED_NAMED = 3
"""Skipped samples whose reason the report gives."""


def draws(counts: Sequence[int], weights: Sequence[float], seed: int) -> Iterator[Key]:
    """Endless mixture of files with `counts` samples each: keys in the order of training.

    Samples of a file are drawn in proportion to its weight, evenly spread; each file in a new order every time it has
    been gone through. With equal weights, sum(counts) draws hold every sample exactly once.
    """
    shares = np.multiply(counts, weights).astype(float)
    total = sum(shares.tolist())
    credit, drawn = np.zeros(len(counts)), [0] * len(counts)
    orders: list[np.ndarray] = [np.empty(0, int)] * len(counts)
    while True:
        credit += shares
        file = int(credit.argmax())
        credit[file] -= total
        epoch, place = divmod(drawn[file], counts[file])
        if place == 0:
            orders[file] = np.random.default_rng([seed, file, epoch]).permutation(counts[file])
        drawn[file] += 1
        yield file, int(orders[file][place])


@dataclasses.dataclass
class _Pack:
    born: int
    keys: list[Key] = dataclasses.field(default_factory=list)
    tokens: int = 0
    tiles: int = 0


def fill_rows(
    sized: Iterable[tuple[Key, int, int]], max_tokens: int, max_tiles: int, open_packs: int
) -> Iterator[list[Key]]:
    """Packs samples of (key, tokens, tiles) into rows of at most `max_tokens` and `max_tiles`.

    Best fit instead of the first fit of CoMemo sec. 4: a sample goes to that of the `open_packs` open packs which it
    fills most. When there are too many, the fullest leaves; age counts as fullness, so no sample waits for ever.
    Input and output are streams: what comes later never changes a row that left.
    """
    packs: list[_Pack] = []
    left = 0
    for key, tokens, tiles in sized:
        fitting = [p for p in packs if p.tokens + tokens <= max_tokens and p.tiles + tiles <= max_tiles]
        if fitting:
            chosen = max(fitting, key=lambda p: p.tokens / max_tokens + p.tiles / max_tiles)
        else:
            chosen = _Pack(born=left)
            packs.append(chosen)
        chosen.keys.append(key)
        chosen.tokens += tokens
        chosen.tiles += tiles
        if len(packs) > open_packs:
            fullest = max(
                packs,
                key=lambda p: max(p.tokens / max_tokens, p.tiles / max_tiles) + (left - p.born) / (10 * open_packs),
            )
            packs.remove(fullest)
            left += 1
            yield fullest.keys
    yield from (p.keys for p in packs)


def ignored_keys(counts: Mapping[str, int]) -> str:
    """What a report says of keys that mean nothing; nothing where there are none."""
    if not counts:
        return ""
    most = sorted(counts.items(), key=lambda item: -item[1])[:KEYS_NAMED]
    more = f" and {len(counts) - KEYS_NAMED} more" * (len(counts) > KEYS_NAMED)
    return f"; keys that are not read: {', '.join(f'{cut(key)} ({count} lines)' for key, count in most)}{more}"


class Plan:
    """Rows of sample keys, made as far as they are asked for; thread-safe. See `train` and `eval`."""

    def __init__(self, samples: Samples, keys: Iterator[Key]):
        self.samples, self.config = samples, samples.config
        self.skipped: dict[str, str] = {}
        """Samples left out so far (`data.on_bad_sample=skip`), and why."""
        config = self.config
        self._rows = fill_rows(self._measured(keys), config.pack_tokens, max(config.pack_tiles, 1), config.open_packs)
        self._files, self._lines, self._ends = array.array("i"), array.array("i"), array.array("q", [0])
        self._used = np.zeros(2, np.int64)
        self._complete, self._hosts = False, 1
        self._lock = threading.Lock()

    @classmethod
    def train(cls, config: DataConfig, processor: Processor, seed: int) -> "Plan":
        """Of the endless mixture of `data.train`, every file shuffled anew each time it has been gone through."""
        samples = Samples(config.train, config, processor, seed)
        return cls(samples, draws([len(lines) for lines in samples.files], samples.weights, seed))

    @classmethod
    def eval(cls, config: DataConfig, processor: Processor) -> "Plan":
        """Of one pass over `data.eval`, in order."""
        samples = Samples(config.eval, config, processor)
        return cls(samples, ((file, line) for file, lines in enumerate(samples.files) for line in range(len(lines))))

    def __len__(self) -> int:
        """Rows made so far."""
        return len(self._ends) - 1

    def extend(self, rows: int | None = None, together: bool = False) -> None:
        """Makes the plan at least `rows` long, or complete; a progress bar shows long work.

        `together`: all hosts call it at the same time with the same plan, and each measures a part of the samples.

        Raises ValueError for a sample that cannot be used under `data.on_bad_sample=raise`.
        """
        console = Console(stderr=True)
        with self._lock, Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            if self._complete:
                return
            self._hosts = jax.process_count() if together else 1
            missing = None if rows is None else max(rows - len(self), 0)
            for keys in progress.track(itertools.islice(self._rows, missing), missing, description="planning rows"):
                for key in keys:
                    self._files.append(key[0])
                    self._lines.append(key[1])
                    size = self.samples.size(key)
                    self._used += size.tokens, size.tiles
                self._ends.append(len(self._files))
            self._complete = missing is None or (rows is not None and len(self) < rows)

    def covers(self, rows: int | None) -> bool:
        """Whether `extend(rows)` would have nothing to do."""
        return self._complete or (rows is not None and len(self) >= rows)

    def dump(self) -> bytes:
        """All rows made so far, with the sizes of their samples, as the bytes of an .npz file without objects."""
        sizes, about = self.samples.measured()
        rows = {"files": self._files, "lines": self._lines, "ends": self._ends}
        arrays = {name: np.frombuffer(values, values.typecode) for name, values in rows.items()}
        facts = json.dumps({"complete": self._complete, **about}).encode()
        content = io.BytesIO()
        np.savez(content, **arrays, **sizes, facts=np.frombuffer(facts, np.uint8))
        return content.getvalue()

    def restore(self, content: bytes) -> None:
        """Takes the rows that `dump` gave of a plan of the same files and config; a fresh plan only."""
        with np.load(io.BytesIO(content)) as stored:  # never unpickles, unless asked to
            arrays = dict(stored)
        facts = json.loads(arrays.pop("facts").tobytes())
        for name, values in (("files", self._files), ("lines", self._lines)):
            values.frombytes(arrays.pop(name).tobytes())
        self._ends = array.array("q", arrays.pop("ends").tobytes())
        self.samples.remember(arrays, facts)
        self._complete = facts["complete"]
        self._used += self.samples.used(self._files, self._lines)
        self.skipped |= self.samples.errors()
        self._rows = itertools.islice(self._rows, len(self), None)  # made again, from known sizes, if more are wanted

    def row(self, row: int) -> list[Key]:
        """The samples of a row, in order."""
        if row >= len(self):
            self.extend(row + 1)
        if row >= len(self):
            raise IndexError(f"the plan ends after {len(self)} rows; there is no row {row}")
        span = slice(self._ends[row], self._ends[row + 1])
        return list(zip(self._files[span], self._lines[span], strict=True))

    def weight(self, keys: Iterable[Key]) -> float:
        """Sum of the loss weights of the targets of samples."""
        counts = (self.samples.size(key).targets for key in keys)
        return sum(count * float(sample_weight(self.config.loss_weight, count)) for count in counts)

    @property
    def fill(self) -> dict[str, float]:
        """Fraction of the `tokens` and of the `tiles` slots of the rows made so far that hold something."""
        tokens, tiles = self._used / max(len(self), 1)
        return {"tokens": tokens / self.config.pack_tokens, "tiles": tiles / max(self.config.pack_tiles, 1)}

    def fingerprint(self, rows: int) -> int:
        """Checksum of the first `rows` rows: equal plans, equal numbers."""
        end = self._ends[rows]
        parts = self._ends[: rows + 1], self._files[:end], self._lines[:end]
        return zlib.crc32(b"".join(part.tobytes() for part in parts))

    def report(self) -> str:
        """One line on what was planned: samples, rows, fill rates, skipped samples."""
        fill = self.fill
        text = (
            f"{len(self._files)} samples in {len(self)} rows of {self.config.pack_tokens} tokens and "
            f"{self.config.pack_tiles} tiles; tokens fill {fill['tokens']:.1%}, tiles fill {fill['tiles']:.1%}"
        )
        if fill["tokens"] < 0.9 < fill["tiles"]:
            text += " (tiles are the limit: raise data.pack_tiles or lower data.pack_tokens)"
        text += ignored_keys(self.samples.ignored)
        if self.skipped:
            reasons = "; ".join(list(self.skipped.values())[:SKIPPED_NAMED])
            text += f"; {len(self.skipped)} samples skipped: {reasons}" + "; ..." * (len(self.skipped) > SKIPPED_NAMED)
        return text

    def _measured(self, keys: Iterator[Key]) -> Iterator[tuple[Key, int, int]]:
        """`keys` with their tokens and tiles, without the samples that are skipped."""
        samples = self.samples
        while chunk := list(itertools.islice(keys, MEASURED_AT_ONCE * self._hosts)):
            samples.measure(chunk, together=self._hosts > 1)
            for key in chunk:
                try:
                    size = samples.size(key)
                except ValueError as error:
                    self._skip(key, error)
                else:
                    yield key, size.tokens, size.tiles

    def _skip(self, key: Key, error: ValueError) -> None:
        if self.config.on_bad_sample == "raise":
            raise ValueError(f"{error}; {SKIP_HINT}") from error
        self.skipped[self.samples.name(key)] = str(error)
        if len(self.skipped) == sum(map(len, self.samples.files)):
            raise ValueError(f"no sample of the data can be used; one of them: {error}") from error
