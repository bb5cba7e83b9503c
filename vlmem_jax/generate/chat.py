"""A conversation: the cache is kept from turn to turn, and made anew when an image comes in.

Earlier tokens attend to all images of the conversation, so a new image changes what they were: the whole conversation
is read again. So is one that outgrows the range of its rotary positions (dynamic NTK), and one without room. Otherwise
only the new question is.
"""

from collections.abc import Iterator, Sequence

from PIL import Image

from vlmem_jax.generate.invocation import InvocationConfig
from vlmem_jax.generate.loop import Generator, Session
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
        self._session: Session | None = None

    def ask(self, question: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """Pieces of the answer as they come. New images stand before the question."""
        asked = self.processor.message(question, images)
        session = self._continued(question, images)
        if session is None:
            sample = self.processor.prompt(asked, history=self.history, rope_dhr=self.rope_dhr, name="chat")
            session = self.generator.start([sample], self.sampling.max_new_tokens + ROOM)
        # broken off before its end, an answer leaves a cache that does not match the history
        self._session = None
        answer = Transcript(self.processor.tokenizer, self.generator.vlm.speech, self.show_memory)
        try:
            for tokens_B in session.stream(self.sampling, self.invocation):
                yield answer.push(int(tokens_B[0]))
            yield answer.flush()
            self._session = session
        finally:
            self.history.append((asked, answer.text))

    def _continued(self, question: str, images: Sequence[Image.Image]) -> Session | None:
        """The last turn's session with the question added, if there is one with room for it and an answer, if the
        memory can see images that come late, and if the rotary frequencies that it was read under still serve."""
        session, vlm = self._session, self.generator.vlm
        if session is None or (images and not vlm.late_views):
            return None
        more = self.processor.follow_up(question, images, rope_dhr=self.rope_dhr)
        count = len(more.tokens_T)
        if session.free < count + self.generator.room(self.sampling.max_new_tokens):
            return None
        if vlm.outgrown(session.read, session.length + count):
            return None
        session.append(more)
        return session
