"""A conversation: the cache is kept from turn to turn, and made anew when an image comes in.

Earlier tokens attend to all images of the conversation, so a new image changes what they were: the whole conversation
is read again. So is one that outgrows the range of its rotary positions (dynamic NTK), and one without room. Otherwise
only the new question is.
"""

from collections.abc import Iterator, Sequence

from PIL import Image

from vlmem_jax.generate.engine import wanted
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import InvocationConfig
from vlmem_jax.generate.pools import Pool
from vlmem_jax.generate.requests import Handle, Request
from vlmem_jax.generate.sampling import SamplingConfig
from vlmem_jax.generate.transcript import Transcript
from vlmem_jax.processing.chat import Message
from vlmem_jax.processing.processor import Processor

ROOM = 512
"""Tokens kept free for later turns when a conversation is read."""


class Chat:
    """One user's conversation with a model."""

    def __init__(
        self,
        generator: Generator,
        processor: Processor,
        sampling: SamplingConfig = SamplingConfig(),
        rope_dhr: bool | None = None,
        invocation: InvocationConfig = InvocationConfig(),
        show_memory: bool = False,
    ):
        """`show_memory`: whether answers also say where a memory was inserted."""
        self.generator = generator
        self.processor = processor
        self.sampling = sampling
        self.rope_dhr = rope_dhr
        self.invocation = invocation
        self.show_memory = show_memory
        self.history: list[tuple[Message, str]] = []
        self._pool = Pool(generator, 1)
        self._turn: Handle | None = None
        """The last answer, whose row is kept."""

    def ask(self, question: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """Pieces of the answer as they come. New images stand before the question."""
        asked = self.processor.message(question, images)
        turn = self._continued(question, images)
        if turn is None:
            sample = self.processor.prompt(asked, history=self.history, rope_dhr=self.rope_dhr, name="chat")
            [turn] = self._pool.submit([Request(sample, self.sampling, self.invocation, keep=True)], ROOM)
        # broken off before its end, an answer leaves a cache that does not match the history
        self._turn = None
        answer = Transcript(self.processor.tokenizer, self.generator.vlm.speech, self.show_memory)
        try:
            for token in turn:
                yield answer.push(token)
            yield answer.flush()
            self._turn = turn
        finally:
            turn.cancel()
            self.history.append((asked, answer.text))

    def _continued(self, question: str, images: Sequence[Image.Image]) -> Handle | None:
        """The answer to a question behind the last one, if that was kept, if there is room for both, if the memory can
        see images that come late, and if the rotary frequencies that all was read under still serve."""
        last, vlm = self._turn, self.generator.vlm
        if last is None or (images and not vlm.late_views):
            return None
        more = self.processor.follow_up(question, images, rope_dhr=self.rope_dhr)
        request = Request(more, self.sampling, self.invocation, after=last, keep=True)
        tokens, tiles, _ = wanted(self.generator, request)
        shape = self._pool.engine.shape
        if tokens > shape.capacity or tiles > shape.tiles or vlm.outgrown(last.read, last.length + len(more.tokens_T)):
            return None
        return self._pool.engine.submit(request)
