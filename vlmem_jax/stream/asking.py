"""Answers about what is kept of a stream: prompts of few shapes behind visual tokens that were made before."""

from collections.abc import Iterator, Sequence

from vlmem_jax.generate import Engine, Request, SamplingConfig, Transcript
from vlmem_jax.processing.video import VideoSize
from vlmem_jax.runtime.shapes import PoolShape
from vlmem_jax.stream.watching import Snapshot, Watcher
from vlmem_jax.types import Sample

LATEST = 99_999.99
"""Seconds of a stream up to which all prompts of a question have the shape of that about a full memory."""


class Asker:
    """Answers questions about snapshots of a watcher's streams, each on its own, by an engine."""

    def __init__(self, watcher: Watcher, sampling: SamplingConfig, rope_dhr: bool | None = None):
        """`rope_dhr` as in `Processor.prompt`. Raises ValueError where not all visual tokens stand in the sequence."""
        if watcher.context.partition(":")[0] not in ("all", "kept"):
            raise ValueError(
                f"all visual tokens that are kept of a stream stand in the sequence, but image.context is "
                f"{watcher.context!r}; give --context all, and a lower --fps for fewer frames"
            )
        self.watcher, self.sampling, self._rope_dhr = watcher, sampling, rope_dhr
        self.processor = watcher.model.processor
        self._engine: Engine | None = None

    def prompt(self, question: str, snapshot: Snapshot, length: float) -> Sample:
        """The prompt of offline mode, were the frames of the snapshot those of a video of `length` seconds.

        Raises ValueError for a question that is too long for the model.
        """
        count, sample = len(snapshot.times), self._prompt(question, snapshot.times, length)
        decoder, room = self.watcher.vlm.config.decoder, self.sampling.max_new_tokens
        wanted = int(sample.positions_T.max()) + 1 + room
        if wanted > decoder.max_positions and not decoder.ntk_factor:
            raise ValueError(
                f"a question must fit into the cache behind {count} frames, but it takes {wanted} positions with "
                f"{room} tokens of the answer, and the model was made for {decoder.max_positions} "
                "(model.decoder.max_positions); shorten it, or lower --max-new-tokens"
            )
        return sample

    def answer(self, question: str, snapshot: Snapshot, length: float) -> Iterator[str]:
        """Pieces of the answer as they come. Raises what `prompt` raises."""
        sample = self.prompt(question, snapshot, length)
        handle = self._holding(question).submit(Request(sample, self.sampling, visual=snapshot.visual))
        said = Transcript(self.processor.tokenizer)
        try:
            for token in handle:
                yield said.push(token)
            yield said.flush()
        finally:
            handle.cancel()

    def _holding(self, question: str) -> Engine:
        """An engine with room for the question about a full memory: so all that are no longer have its programs."""
        full = self._prompt(question, (LATEST,) * self.watcher.slots, LATEST)
        longest = len(full.tokens_T) + self.sampling.max_new_tokens
        shape = PoolShape.of(1, longest, self.watcher.slots).in_a_piece
        if self._engine is None or not shape.fits(self._engine.shape):
            self._engine = Engine(self.watcher.generator, shape)
        return self._engine

    def warm(self) -> None:
        """Compiles what looking and a question of a few words take, so that neither waits for it."""
        for _ in self.answer("?", Snapshot(self.watcher.warm(), (0.0,), 1), 1.0):
            break

    def _prompt(self, question: str, times: Sequence[float], length: float) -> Sample:
        """The prompt about frames of these times."""
        side, count = self.watcher.vlm.tile.side, len(times)
        size = VideoSize(count, side, side, length / count, tuple(times), length)
        return self.processor.recalled(question, size, rope_dhr=self._rope_dhr, name="question")
