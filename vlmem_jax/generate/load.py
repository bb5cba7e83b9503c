"""A model and its processor from a folder: a workdir of training, a converted checkpoint, or a Hugging Face folder."""

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vlmem_jax.checkpoint import folder, store
from vlmem_jax.config import build, to_dict
from vlmem_jax.families import of_model, resolve
from vlmem_jax.generate.generator import Generator
from vlmem_jax.generate.invocation import delimiters
from vlmem_jax.hub import repos
from vlmem_jax.hub.convert import is_released, load_onto, released
from vlmem_jax.hub.tokenizer_files import TokenizerFiles
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.models.placement import check_heads, serving_mesh
from vlmem_jax.models.vlm import Params
from vlmem_jax.paths import AnyPath
from vlmem_jax.processing import AnyImageConfig, Processor, Tokenizer, make_processor
from vlmem_jax.runtime.sharding import MeshConfig, make_mesh, param_shardings


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What answering needs."""

    vlm: VLM
    params: Params
    processor: Processor
    mesh: Mesh

    def showing(self, image: Mapping[str, Any], where: str = "image") -> "LoadedModel":
        """The same, which is shown images and videos with other values of these keys of its config of images.

        Raises ConfigError, naming the key below `where`, for one that this config does not have.
        """
        old, family = self.processor, of_model(self.vlm.config)
        config = build(type(old.image), to_dict(old.image) | dict(image), where)
        geometry = self.vlm.config.vision.geometry
        tile = self.vlm.tile_of(config)
        new = make_processor(old.tokenizer, config, geometry, old.system, family.template, old.whole, tile)
        new.geometry_of = old.geometry_of
        return dataclasses.replace(self, processor=new)

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

    `path` is a folder of ours, on a disk or gs://, or one in the Hugging Face layout, on a disk or a repository of the
    hub. `mesh`: None for that of `serving_mesh`; `adapter`: the one to answer through, or none (default: the first that
    the model has); `context`: which visual tokens stand in the sequence (default: as trained). Raises ValueError if
    there is no checkpoint, if it does not fit its own config, or the model cannot be split so.
    """

    def shown(image: AnyImageConfig) -> AnyImageConfig:
        return image if context is None else dataclasses.replace(image, context=context)

    found, vlm, processor = _described(path, adapter, shown)
    devices = jax.devices() if devices is None else devices
    over = make_mesh(mesh or serving_mesh(vlm, devices), devices)
    check_heads(vlm.config, over)
    target = vlm.held(param_shardings(over, vlm.abstract(), vlm.axes()))
    return LoadedModel(vlm, found.load(vlm, target), processor, over)


def describe(
    path: str | os.PathLike, adapter: str | None = None, image: Mapping[str, Any] | None = None
) -> tuple[VLM, Processor]:
    """What `load_model` gives but for parameters, of which none is read; `image`: other values of keys of the config of
    images. Raises as `load_model`."""

    def shown(found: AnyImageConfig) -> AnyImageConfig:
        return build(type(found), to_dict(found) | dict(image or {}), "config.image")

    return _described(path, adapter, shown)[1:]


def _described(
    path: str | os.PathLike, adapter: str | None, shown: Callable[[AnyImageConfig], AnyImageConfig]
) -> tuple["_Found", VLM, Processor]:
    source = repos.folder(path)
    found = _released(source) if is_released(source) else _ours(source)
    vlm = VLM(found.model, 0 if adapter is None else found.model.adapter_number(adapter))
    image = shown(found.image)
    tokenizer, geometry = Tokenizer.load(found.tokenizer, vlm.special_tokens), vlm.config.vision.geometry
    read = found.system, of_model(vlm.config).template, vlm.reads_beyond
    return found, vlm, make_processor(tokenizer, image, geometry, *read, vlm.tile_of(image))


class _Found(NamedTuple):
    """A checkpoint that was found: its configs, and how its parameters are loaded."""

    model: ModelConfig
    image: AnyImageConfig
    tokenizer: AnyPath
    system: str | None
    load: Callable[[VLM, Params], Params]
    """`load(vlm, target)` gives the parameters in the dtypes and places of `target`."""


def _ours(source: AnyPath) -> _Found:
    """Reads what a checkpoint of ours says."""
    checkpoint = folder.find(source)
    described = checkpoint.model
    model = resolve(described["model"], f"{checkpoint.root}/{folder.MODEL_FILE}: model")
    image = build(of_model(model).image, described["image"], f"{checkpoint.root}/{folder.MODEL_FILE}: image")
    load = functools.partial(store.load_params, checkpoint.step_folder)
    return _Found(model, image, checkpoint.tokenizer, described["system"], lambda _, target: load(target))


def _released(source: AnyPath) -> _Found:
    """Reads what a folder in the Hugging Face layout says. Raises ValueError where its tokenizer lacks tokens of
    images, which `vlmem convert` adds."""
    found = released(source)
    lacking = TokenizerFiles.of(source, of_model(found.model).added_tokens).added
    if lacking:
        raise ValueError(
            f"the tokenizer in {source} lacks {' '.join(lacking)}; add them, and make a checkpoint, by "
            f"`vlmem convert {shlex.quote(str(source))} NEW_FOLDER`"
        )
    return _Found(found.model, found.image, source, None, functools.partial(load_onto, source))
