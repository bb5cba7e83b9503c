"""Our models in lmms-eval (the extra `lmms`), where benchmarks are tasks:

    lmms_eval --model vlmem --model_args checkpoint=RUN --tasks mmstar --batch_size 16

`model_args` are those of `LmmsModel`. Requests to generate are answered, `num_beams` of 1; `until` cuts an answer, but
for a blank line, which the harness stops at by default and answers that reason may hold. Choices are compared by how
probable each is as the answer, where no memory may break into it.
"""

import dataclasses
import itertools
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL import Image
from tqdm import tqdm

from vlmem_jax.config import build
from vlmem_jax.evals.answers import Answering, random_keys
from vlmem_jax.evals.run import WINDOW
from vlmem_jax.generate import InvocationConfig, SamplingConfig, load_model
from vlmem_jax.generate.requests import Handle
from vlmem_jax.geometry.newest import Newest
from vlmem_jax.geometry.pictures import Fit
from vlmem_jax.geometry.store import geometry_of
from vlmem_jax.models.placement import asked_mesh
from vlmem_jax.processing.images import open_image
from vlmem_jax.processing.shown import shown
from vlmem_jax.runtime.sharding import MESH_AXES
from vlmem_jax.types import Sample


class LmmsModel(lmms):
    """A checkpoint as a chat model of lmms-eval."""

    is_simple = False

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str = 1,
        seed: int = 0,
        rope_dhr: bool | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        geometry: str = "",
        geometry_fit: Fit = "crop",
        **settings: Any,
    ):
        """`settings`: keys of the model's config of images, such as frames=32 and time_line=False, where they are to
        differ from those it was trained with; keys of `InvocationConfig`, such as mode=never, for models whose memory
        speaks; and sizes of `MeshConfig`, such as tensor=4 and data=2.

        `geometry`: folder or repository of a public model of geometry, for a memory that reads it; `geometry_fit`: how
        frames become what that takes.

        `device` and `max_batch_size` come from the harness and are not used: JAX takes all devices that it has.
        """
        super().__init__()
        sizes = {axis: settings.pop(axis) for axis in MESH_AXES if axis in settings}
        loaded = load_model(checkpoint, asked_mesh(sizes, "model_args"))
        keys = [field.name for field in dataclasses.fields(loaded.processor.image) if field.name in settings]
        self.loaded = loaded.showing({key: settings.pop(key) for key in keys}, "model_args")
        if geometry:
            processor = self.loaded.processor
            processor.geometry_of = Newest(geometry_of(processor, geometry, geometry_fit))
        self.generator = self.loaded.generator()
        self.answering = Answering(self.generator, self.loaded.processor.tokenizer, int(batch_size))
        self.batch_size, self.seed, self.rope_dhr = int(batch_size), seed, rope_dhr
        self._encode = self.loaded.processor.tokenizer.text_encoder(())
        self.invocation = build(InvocationConfig, settings, "model_args")
        if settings and self.loaded.vlm.speech is None:
            raise ValueError(
                f"model_args {', '.join(settings)} are for models whose memory speaks while they answer, but "
                f"model.memory of {checkpoint} is {self.loaded.vlm.config.memory_kind}; leave them out"
            )

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to each request. Raises ValueError, naming task and document, for what cannot be asked."""
        results: dict[int, GenerationResult] = {}
        live: dict[int, Handle] = {}
        at_once = WINDOW * self.batch_size
        with tqdm(total=len(requests), desc="answering") as bar:
            for first in range(0, len(requests), at_once):
                window = range(first, min(first + at_once, len(requests)))
                samples = [self._sample(requests[n]) for n in window]
                keys_N, how = random_keys(self.seed, [(n,) for n in window]), [requests[n].args[2] for n in window]
                asked = self.answering.submit(samples, keys_N, [sampling_of(of) for of in how], self.invocation)
                live |= zip(window, asked, strict=True)
                while len(live) > (self.batch_size if window.stop < len(requests) else 0):
                    self.answering.step()
                    for n in [n for n, handle in live.items() if handle.reason]:
                        results[n] = self._result(live.pop(n), requests[n].args[2])
                        bar.update()
        return [results[n] for n in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """For each request, the loss of its text as the answer, summed over tokens, and whether it is the greedy
        answer: the harness takes the choice with the least loss. Raises ValueError where memories may be inserted."""
        if self.loaded.vlm.speech is not None and self.invocation.mode != "never":
            raise ValueError(
                "a text has no likelihood of its own where memories may be inserted into it, since that depends on "
                f"where they are called for, but model_args mode is {self.invocation.mode}; set mode=never"
            )
        texts = [self._encode(self._continuation(request)) for request in requests]
        results = [(0.0, True)] * len(requests)  # those of an empty text
        asked: dict[tuple, list[int]] = {}
        for n, request in enumerate(requests):
            if texts[n]:
                asked.setdefault((request.args[0], *request.args[2:]), []).append(n)
        with tqdm(total=len(asked), desc="scoring") as bar:
            for first in range(0, len(asked), self.batch_size):
                prompts = dict(itertools.islice(asked.items(), first, first + self.batch_size))
                given = [[texts[n] for n in places] for places in prompts.values()]
                found = self.answering.likelihoods([self._context(*of) for of in prompts], given, self.invocation)
                for places, each in zip(prompts.values(), found, strict=True):
                    for n, likelihood in zip(places, each, strict=True):
                        results[n] = (-likelihood.logp, likelihood.greedy)
                    bar.update()
        return results

    def _continuation(self, request: Instance) -> str:
        text = request.args[1]
        if not callable(text):
            return text
        _, _, _, doc_id, task, split = request.args
        return text(self.task_dict[task][split][doc_id])

    def _context(self, context: str, *of: Any) -> Sample:
        """The prompt of a text whose likelihood is asked for: behind what its document shows, if it belongs to one."""
        shows, name = [], ""
        if of:
            doc_to_visual, doc_id, task, split = of
            name = f"{task}/{split}/{doc_id}"
            shows = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        parts = [{"type": "video" if isinstance(one, str) else "image", "url": one} for one in shows]
        return self._conversation([{"role": "user", "content": [*parts, {"type": "text", "text": context}]}], name)

    def generate_until_multi_round(self, requests: list[Instance]) -> NoReturn:
        raise NotImplementedError("tasks of several rounds are not supported; take one of output_type generate_until")

    def _result(self, handle: Handle, settings: dict[str, Any]) -> GenerationResult:
        transcript = self.answering.answer(handle).transcript
        return GenerationResult(
            cut(transcript.text, settings.get("until")), TokenCounts(output_tokens=transcript.chosen)
        )

    def _sample(self, request: Instance) -> Sample:
        """The conversation of a request as model input."""
        _, doc_to_messages, _, doc_id, task, split = request.args
        name = f"{task}/{split}/{doc_id}"
        return self._conversation(doc_to_messages(self.task_dict[task][split][doc_id]), name)

    def _conversation(self, messages: list[dict[str, Any]], name: str) -> Sample:
        messages = ChatMessages(messages=messages).messages
        processor = self.loaded.processor
        said = []
        for message in messages:
            parts = []
            for part in message.content:
                if part.type == "text":
                    parts.append(part.text)
                elif part.type == "image":
                    picture = part.url
                    if not isinstance(picture, Image.Image):
                        picture = open_image(picture, config=processor.image)
                    parts += processor.message((), [shown(picture, processor.image, name)])
                elif part.type == "video" and (part.start_time, part.end_time) == (None, None):
                    parts += processor.message((), videos=[processor.open_video(part.url)[0]])
                else:
                    raise ValueError(f"texts, images and whole videos can be asked about, got {part.type} ({name})")
            if message.role != "user" and not all(isinstance(part, str) for part in parts):
                raise ValueError(f"only the user may show images and videos, got one of {message.role} ({name})")
            said.append(parts if message.role == "user" else "".join(parts))
        roles = [message.role for message in messages]
        system = said.pop(0) if roles[:1] == ["system"] else None
        turns = roles[system is not None :]
        if turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ValueError(f"a conversation must alternate user, assistant and end with user, got {roles} ({name})")
        history = list(zip(said[:-1:2], said[1::2], strict=True))
        return processor.prompt(said[-1], history=history, rope_dhr=self.rope_dhr, system=system, name=name)


def sampling_of(settings: dict[str, Any]) -> SamplingConfig:
    """From a task's generation_kwargs. Raises ValueError for beams, and values out of range."""
    if (settings.get("num_beams") or 1) != 1:
        raise ValueError(f"num_beams must be 1, got {settings['num_beams']}; set it with --gen_kwargs num_beams=1")
    drawn = settings.get("do_sample")
    temperature = 0.0 if drawn is False else settings.get("temperature")
    return SamplingConfig(
        max_new_tokens=settings.get("max_new_tokens") or SamplingConfig().max_new_tokens,
        temperature=float(temperature if temperature is not None else bool(drawn)),
        top_k=settings.get("top_k") or 0,
        top_p=float(settings.get("top_p") or 1.0),
    )


def cut(text: str, until: str | list[str] | None) -> str:
    """`text` before the first of `until`, a blank line left out."""
    for end in [until] if isinstance(until, str) else until or []:
        if end and end != "\n\n":
            text = text.partition(end)[0]
    return text
