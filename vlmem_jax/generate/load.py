"""A model and its processor from a folder: a workdir of training, a converted checkpoint, or a Hugging Face folder."""

import dataclasses
import os

import jax
from jax.sharding import Mesh

from vlmem_jax.checkpoint import folder, store
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.generate.loop import Generator
from vlmem_jax.models import VLM
from vlmem_jax.models.presets import resolve
from vlmem_jax.models.vlm import Params
from vlmem_jax.processing import Processor, Tokenizer, image_config, make_processor
from vlmem_jax.sharding import MeshConfig, make_mesh, param_shardings


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What answering needs."""

    vlm: VLM
    params: Params
    processor: Processor
    mesh: Mesh

    def generator(self) -> Generator:
        """Stops at the end of an answer and never samples a control token."""
        speech = self.vlm.speech
        called = set(speech.invoke_ids) if speech else set()
        unknown = range(self.processor.tokenizer.vocab_size, self.vlm.config.decoder.vocab)
        return Generator(
            self.vlm,
            self.params,
            stop_ids=self.processor.stop_ids,
            banned_ids=sorted({*self.processor.control_ids, *unknown} - called),
            delimiter_ids=delimiters(self.processor.tokenizer) if speech else (),
            mesh=self.mesh,
        )


def load_model(path: str | os.PathLike, mesh: MeshConfig = MeshConfig()) -> LoadedModel:
    """The newest checkpoint at `path`, its parameters in the compute dtype and sharded over `mesh`.

    Raises ValueError if there is none, or it does not fit its own config.
    """
    checkpoint = folder.find(path)
    described = checkpoint.model
    vlm = VLM(resolve(described["model"], f"{checkpoint.root}/{folder.MODEL_FILE}: model"))
    image = image_config(described["image"], f"{checkpoint.root}/{folder.MODEL_FILE}: image")
    tokenizer, geometry = Tokenizer.load(checkpoint.tokenizer), vlm.config.vision.geometry
    processor = make_processor(tokenizer, image, geometry, described["system"], described["template"])
    devices = make_mesh(mesh)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, vlm.dtype, sharding=sharding),
        vlm.abstract(),
        param_shardings(devices, vlm.abstract(), vlm.axes()),
    )
    return LoadedModel(vlm, store.load_params(checkpoint.step_folder, target), processor, devices)
