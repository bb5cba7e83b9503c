"""A model and its processor from a folder: a workdir of training, a converted checkpoint, or a Hugging Face folder."""

import dataclasses
import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from vlmem_jax.checkpoint import folder, store
from vlmem_jax.config import build
from vlmem_jax.families import of_model, resolve
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.generate.loop import Generator
from vlmem_jax.models import VLM
from vlmem_jax.models.placement import check_heads, serving_mesh
from vlmem_jax.models.vlm import Params
from vlmem_jax.processing import Processor, Tokenizer, make_processor
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What answering needs."""

    vlm: VLM
    params: Params
    processor: Processor
    mesh: Mesh

    def generator(self) -> Generator:
        """Stops at the end of an answer and never samples a control token."""
        banned = never_sampled(self.processor, self.vlm)
        return Generator(
            self.vlm,
            self.params,
            stop_ids=self.processor.stop_ids,
            banned_ids=banned,
            delimiter_ids=delimiters(self.processor.tokenizer) if self.vlm.speech else (),
            tile=self.processor.tile,
            mesh=self.mesh,
        )


def never_sampled(processor: Processor, vlm: VLM) -> tuple[int, ...]:
    """Ids that a model must not generate: control tokens, and rows of the token table that stand for no token.

    But for those that call for a memory.
    """
    calls = vlm.speech.invoke_ids if vlm.speech else ()
    tokenizer = processor.tokenizer
    banned = *processor.control_ids, *tokenizer.unused, *range(tokenizer.vocab_size, vlm.config.decoder.vocab)
    return tuple(token for token in banned if token not in calls)


def load_model(
    path: str | os.PathLike,
    mesh: MeshConfig | None = None,
    devices: Sequence[jax.Device] | None = None,
    adapter: str | None = None,
    context: str | None = None,
) -> LoadedModel:
    """The newest checkpoint at `path`, its parameters as `VLM.held`, sharded over `devices` (default: all).

    `mesh`: None for that of `serving_mesh`; `adapter`: the one to answer through, or none (default: the first that the
    model has); `context`: which visual tokens stand in the sequence (default: as trained). Raises ValueError if there
    is no checkpoint, if it does not fit its own config, or the model cannot be split so.
    """
    checkpoint = folder.find(path)
    described = checkpoint.model
    model = resolve(described["model"], f"{checkpoint.root}/{folder.MODEL_FILE}: model")
    vlm = VLM(model, 0 if adapter is None else model.adapter_number(adapter))
    family = of_model(vlm.config)
    images = described["image"] | ({} if context is None else {"context": context})
    image = build(family.image, images, f"{checkpoint.root}/{folder.MODEL_FILE}: image")
    tokenizer, geometry = Tokenizer.load(checkpoint.tokenizer, vlm.special_tokens), vlm.config.vision.geometry
    processor = make_processor(tokenizer, image, geometry, described["system"], family.template, vlm.reads_beyond)
    devices = jax.devices() if devices is None else devices
    over = make_mesh(mesh or serving_mesh(vlm, devices), devices)
    check_heads(vlm.config, over)
    target = vlm.held(param_shardings(over, vlm.abstract(), vlm.axes()))
    return LoadedModel(vlm, store.load_params(checkpoint.step_folder, target), processor, over)
