"""A folder in the released Hugging Face layout -> our checkpoint, or straight into sharded arrays; and back."""

import collections
import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from vlmem_jax import families
from vlmem_jax.checkpoint import find
from vlmem_jax.checkpoint.folder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FOLDER, base_of
from vlmem_jax.config import build, overlay, to_dict
from vlmem_jax.families import Family, Released
from vlmem_jax.hub import library, orbax_io, peft, repos
from vlmem_jax.hub.fit import BUFFERS, check_fit
from vlmem_jax.hub.leaves import Extended, Fresh, FromTensors, Held, Leaf, Maker, Started
from vlmem_jax.hub.safetensors_io import Tensors, Writer
from vlmem_jax.hub.tokenizer_files import FILES, TokenizerFiles
from vlmem_jax.memory import TokenStart, memory_of
from vlmem_jax.models import VLM, ModelConfig
from vlmem_jax.models.adapters import make_adapters, merged
from vlmem_jax.models.vlm import Params, make_memory
from vlmem_jax.paths import AnyPath, as_path, is_remote, read_json, write_whole
from vlmem_jax.processing import AnyImageConfig, Tokenizer, chat
from vlmem_jax.trees import flatten, unflatten

RELEASED_CONFIG = "released_config.json"
"""The config.json a checkpoint came with; export keeps its keys that mean nothing here."""
UNREAD_FILE = "unread.safetensors"
"""The tensors it came with that nothing computes with; export gives them back."""
SHARD_BYTES = 5_000_000_000
ROWS = 4096
"""Of the embedding, read at once."""
Progress = Callable[[int, int], None]
"""Told, as work goes on, the bytes that are done and those there are in all."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    folder: AnyPath | str
    """Where it is now; an address, if it was pushed."""
    parameters: int
    nbytes: int
    fresh: tuple[str, ...] = ()
    """Paths that no tensor was there for: newly initialised."""
    new_rows: int = 0
    """Rows added to the vocabulary."""
    new_tokens: tuple[str, ...] = ()
    """Tokens added to the tokenizer."""
    unused: tuple[str, ...] = ()
    """Files of the source that were not read."""
    notes: tuple[str, ...] = ()
    """What one should know of the source, or of what others will make of the target; a line each."""


def import_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    model: ModelConfig | None = None,
    image: AnyImageConfig | None = None,
    adapters: Sequence[str | os.PathLike] = (),
    vision: str | os.PathLike | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Converts the Hugging Face folder `source`, or a repository of the hub, into a new checkpoint folder `target`, on
    a disk or gs://, dtypes kept.

    model, image: what to make of it (default: what its config.json says). A model with memory blocks may start from a
    checkpoint without, and one with a larger vocabulary from a smaller one; `seed` is that of what is made new.
    adapters: folders of PEFT, each an adapter of the model by the name of the folder, beside those that lie in
    SOURCE/adapters. vision: the folder of the vision tower, where the checkpoint lacks it. Raises ValueError listing
    all tensors and keys that do not fit; `target` appears whole or not at all.
    """
    source = _local(source)
    tensors, content, found = _open(source, None if vision is None else _local(vision))
    tokenizer = TokenizerFiles.of(source, families.of_config(content).added_tokens)
    if model is None:
        vocab = max(found.model.decoder.vocab, tokenizer.new_size)
        model = dataclasses.replace(found.model, decoder=dataclasses.replace(found.model.decoder, vocab=vocab))
    if model.decoder.vocab < tokenizer.new_size:
        raise ValueError(
            f"model.decoder.vocab must be at least {tokenizer.new_size}, the size of the tokenizer with "
            f"{len(tokenizer.added)} added tokens; got {model.decoder.vocab}"
        )
    model, given = _with_adapters(model, [*peft.beside(source), *map(_local, adapters)])
    leaves, fresh, new_rows = _leaves(VLM(model), tensors, found.model, given, seed, source)
    total = sum(leaf.nbytes for leaf in leaves.values())
    with whole_folder(target, total) as folder:
        orbax_io.write_leaves(folder / "0", leaves, lambda done: progress(done, total))
        tokenizer.copy(folder / TOKENIZER_FOLDER, VLM(model).special_tokens)
        about = {"model": to_dict(model), "image": to_dict(image or found.image), "system": None}
        _write_json(folder / RELEASED_CONFIG, content)
        if kept := _unread(model, tensors):
            write_whole(folder / UNREAD_FILE, safetensors.numpy.save(kept))
        _write_json(folder / MODEL_FILE, about)  # last: without it, a folder is no checkpoint
    more = dict(new_tokens=tokenizer.added, unused=_unused(source), notes=_notes(source, tensors, model))
    return _summary(target, leaves, fresh=fresh, new_rows=new_rows, **more)


def _unread(model: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that nothing computes with, by name."""
    pattern = families.of_model(model).unread(model)
    return {name: np.array(x) for name, x in tensors.items() if pattern and pattern.match(name)}


def _kept(root: AnyPath) -> dict[str, np.ndarray]:
    """What `_unread` found when the checkpoint in `root` was made."""
    file = root / UNREAD_FILE
    if not file.is_file():
        return {}
    with tempfile.TemporaryDirectory() as here:  # its library reads no bfloat16, and a file in a bucket is no file
        (Path(here) / UNREAD_FILE).write_bytes(file.read_bytes())
        return {name: np.array(x) for name, x in Tensors(here, Path(UNREAD_FILE).stem).items()}


def _notes(source: Path, tensors: Mapping[str, np.ndarray], model: ModelConfig) -> tuple[str, ...]:
    notes = []
    kinds = collections.Counter(tensor.dtype.name for tensor in tensors.values())
    if len(kinds) > 1:
        counts = ", ".join(f"{count} of {kind}" for kind, count in kinds.most_common())
        notes.append(f"tensors of several dtypes, which are kept: {counts}")
    if left := sum(name.endswith(BUFFERS) for name in tensors):
        notes.append(f"{left} tensors named *{BUFFERS[0]} are not read: they follow from the config")
    if differs := library.template_differs(source, chat.template(families.of_model(model).template)):
        notes.append(differs)
    return tuple(notes)


def _unused(source: Path) -> tuple[str, ...]:
    """Files beside the tensors that hold weights or settings and that nothing reads: an adapter that is not merged, the
    same weights in another format, code."""
    read = {CONFIG_FILE, families.PREPROCESSOR_FILE, families.VIDEO_FILE, "processor_config.json", *FILES}
    indices = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    telling = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".py", ".json")
    names = [path.name for path in source.iterdir() if path.is_file() and path.suffix in telling]
    is_model = [name for name in names if name.startswith("model") and name.endswith(".safetensors")]
    return tuple(sorted(set(names) - read - set(indices) - set(is_model)))


def load_folder(
    source: str | os.PathLike, vlm: VLM, shardings: Mapping, *, dtype: jax.typing.DTypeLike | None = None, seed: int = 0
) -> Params:
    """Parameters of `vlm` straight from a Hugging Face folder; each host reads only what its devices hold.

    shardings: a tree like `vlm.abstract()`. dtype: of all parameters (default: as stored). See `import_folder` for what
    may be missing, and for what raises ValueError.
    """
    source = _local(source)
    tensors, _, found = _open(source)
    names = [adapter.name for adapter in vlm.config.adapters]
    model, given = _with_adapters(vlm.config, [path for path in peft.beside(source) if path.name in names])
    if model != vlm.config:
        raise ValueError(f"model.adapters {vlm.config.adapters} must be those in {source}: {model.adapters}")
    leaves, _, _ = _leaves(vlm, tensors, found.model, given, seed, source)
    where = flatten(shardings)
    made = {path: leaf.maker for path, leaf in leaves.items() if isinstance(leaf, Fresh)}
    arrays = {path: leaf.array(where[path], dtype) for path, leaf in leaves.items() if path not in made}
    for maker in dict.fromkeys(made.values()):
        arrays |= maker.arrays({path: where[path] for path in made if made[path] is maker}, dtype)
    return unflatten(arrays)


def load_onto(source: str | os.PathLike, vlm: VLM, target: Params, seed: int = 0) -> Params:
    """Parameters as `load_folder` gives them, in the dtypes and places of the tree `target`."""
    places = jax.tree.map(lambda t: t.sharding, target)
    params = load_folder(source, vlm, places, seed=seed)

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x, t: jnp.asarray(x, t.dtype), params, target)

    return jax.jit(cast, out_shardings=places, donate_argnums=0)(params)


def _with_adapters(model: ModelConfig, folders: Sequence[Path]) -> tuple[ModelConfig, dict[str, Leaf]]:
    """The model with the adapters of these folders, in place of its own of the same names, and their leaves by path."""
    adapters, leaves = {adapter.name: adapter for adapter in model.adapters}, {}
    for folder in folders:
        adapters[folder.name], arrays = peft.read_adapter(folder, model, folder.name)
        leaves |= {f"adapters/{folder.name}/{path}": Held(x) for path, x in arrays.items()}
    return dataclasses.replace(model, adapters=tuple(adapters.values())), leaves


def export_folder(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    merge: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Summary:
    """Writes a checkpoint (workdir, stage, step or converted folder) as a new Hugging Face folder `target` on a disk.

    dtype: float32, bfloat16 or float16 (default: as stored). Adapters lie in TARGET/adapters, in PEFT's layout; or
    `merge` names one that the weights are written with, without the others. `target` appears whole or not at all.
    """
    if is_remote(target):
        raise ValueError(f"a folder in the Hugging Face layout is written to a disk; got {target}")
    checkpoint = find(repos.folder(source))
    about = checkpoint.model
    model = families.resolve(about["model"])
    family = families.of_model(model)
    rules = family.name_table(model, None, None)
    stored = _stored(checkpoint.step_folder)
    _check_leaves({path: x.shape for path, x in flatten(VLM(model).abstract()).items()}, stored, checkpoint.step_folder)
    adapters = {one.name: (one, _of_adapter(stored, one.name)) for one in model.adapters}
    if merge is not None and merge not in adapters:
        raise ValueError(f"the model has the adapters {', '.join(adapters) or 'none'}, and no {merge} to merge")
    layout = {
        name: (rule.shape, np.dtype(dtype) if dtype else stored[rule.ours].dtype)
        for rule in rules
        for name in rule.names
    }
    unread = _kept(checkpoint.root)
    layout |= {name: (x.shape, np.dtype(dtype) if dtype else x.dtype) for name, x in unread.items()}
    total = sum(leaf.nbytes for leaf in stored.values())
    done = 0
    with whole_folder(target, sum(math.prod(shape) * kind.itemsize for shape, kind in layout.values())) as folder:
        tensors = Writer(folder, layout, shard_bytes)
        for rule in rules:
            start = 0
            for slab in stored[rule.ours].slabs():
                done += slab.nbytes
                if merge is not None:
                    adapter, arrays = adapters[merge]
                    layers = {path: x[start : start + len(slab)] for path, x in arrays.items()}
                    slab = merged(model, adapter, layers, rule.ours, slab)
                _assign(rule, tensors, slab, start)
                start += len(slab)
                progress(done, total)
        for name, tensor in unread.items():
            tensors[name][...] = tensor
        tensors.flush()
        for name, (adapter, arrays) in adapters.items() if merge is None else ():
            peft.write_adapter(folder / peft.FOLDER / name, model, adapter, arrays)
        TokenizerFiles.of(checkpoint.tokenizer, ()).copy(folder, VLM(model).special_tokens)
        kinds = [kind.name for _, kind in layout.values()]
        image = build(family.image, about["image"], f"{MODEL_FILE} image")
        has_tokenizer = any((checkpoint.tokenizer / name).is_file() for name in FILES[:2])
        tokenizer = Tokenizer.load(checkpoint.tokenizer) if has_tokenizer else None
        contents = family.write_files(model, image, max(kinds, key=kinds.count), tokenizer)
        original = _optional_json(checkpoint.root / RELEASED_CONFIG)
        contents[CONFIG_FILE] = overlay(original, contents[CONFIG_FILE])
        for name, content in contents.items():
            _write_json(folder / name, content)
        notes = tuple(library.misread(contents[CONFIG_FILE]))
    return _summary(target, stored, notes=notes)


def _of_adapter(stored: Mapping[str, Leaf], name: str) -> dict[str, np.ndarray]:
    """A and B of an adapter by path in it."""
    start = f"adapters/{name}/"
    return {path.removeprefix(start): leaf.read(()) for path, leaf in stored.items() if path.startswith(start)}


def _stored(step_folder: AnyPath) -> Mapping[str, Leaf]:
    """All parameters of a step, those of its base with them."""
    base = base_of(step_folder)
    return {**(_stored(base) if base else {}), **orbax_io.read_leaves(step_folder / "params")}


def _assign(rule, tensors: Mapping[str, np.ndarray], slab: np.ndarray, start: int) -> None:
    """Puts rows `start` ... of a leaf's first axis where they belong."""
    if rule.stacked:
        for name, layer in zip(rule.names[start : start + len(slab)], slab, strict=True):
            view = rule.view(tensors[name])
            view[...] = layer.reshape(view.shape)
    else:
        rule.view(tensors[rule.names[0]])[start : start + len(slab)] = slab


def released(source: str | os.PathLike, vision: str | os.PathLike | None = None) -> Released:
    """What a Hugging Face folder says of its model, with the adapters that lie in it; `vision` as in `import_folder`.
    Raises ValueError naming what is missing or not supported."""
    source = _local(source)
    found = _open(source, None if vision is None else _local(vision))[2]
    model, _ = _with_adapters(found.model, peft.beside(source))
    return dataclasses.replace(found, model=model)


def is_released(folder: AnyPath) -> bool:
    """Whether the folder is one in the Hugging Face layout, and none of ours."""
    return (folder / CONFIG_FILE).is_file() and not (folder / MODEL_FILE).is_file()


def _local(source: str | os.PathLike) -> Path:
    """The folder of the disk that `source` means, in the Hugging Face layout."""
    if is_remote(source):
        raise ValueError(f"a folder in the Hugging Face layout must lie on a disk; got {source}")
    return Path(repos.folder(source))


class _Joined(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint, and of its tower's own folder, where those whose names begin with `there` begin with
    `here`."""

    def __init__(self, tensors: Tensors, tower: Tensors, here: str, there: str):
        self._tensors, self._tower = tensors, tower
        self._names = {here + name.removeprefix(there): name for name in tower if name.startswith(there)}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tower[self._names[name]] if name in self._names else self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._tensors), **self._names})

    def __len__(self) -> int:
        return len({**dict.fromkeys(self._tensors), **self._names})


def _with_tower(folder: Path, tensors: Tensors, family: Family, vision: Path | None) -> Mapping[str, np.ndarray]:
    """The tensors of `folder`, with those of a tower that has a folder of its own."""
    if family.apart is None:
        if vision is not None:
            raise ValueError(f"--vision is for checkpoints that lack their vision tower; {folder} is none")
        return tensors
    here, there = family.apart
    if vision is not None:
        return _Joined(tensors, Tensors(vision), here, there)
    if not any(name.startswith(here) for name in tensors):
        raise ValueError(f"{folder} lacks its vision tower; convert it with --vision FOLDER, the tower's own folder")
    return tensors


def _open(folder: Path, vision: Path | None = None) -> tuple[Mapping[str, np.ndarray], dict, Released]:
    if not folder.is_dir():
        raise ValueError(f"a checkpoint is a folder; there is no folder {folder}")
    if not (folder / CONFIG_FILE).is_file():
        if (folder / peft.CONFIG_FILE).is_file():
            raise ValueError(
                f"{folder} is an adapter (LoRA) without its model; convert the model, with --adapter {folder}"
            )
        raise ValueError(f"{folder} has no {CONFIG_FILE}; a folder in the Hugging Face layout must hold it")
    content = read_json(folder / CONFIG_FILE)
    preprocessor = _optional_json(folder / families.PREPROCESSOR_FILE) or _newer_preprocessor(folder, "image_processor")
    if videos := _optional_json(folder / families.VIDEO_FILE) or _newer_preprocessor(folder, "video_processor"):
        preprocessor = {**(preprocessor or {}), "video_processor": videos}
    with _told_of(folder / CONFIG_FILE):
        family = families.of_config(content)
    tensors = _with_tower(folder, Tensors(folder), family, vision)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    with _told_of(folder / CONFIG_FILE):
        return tensors, content, family.read_config(content, shapes, preprocessor)


@contextlib.contextmanager
def _told_of(file: Path) -> Iterator[None]:
    """Makes what a config raises a ValueError that names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # a value of another kind than the key has, such as null
        raise ValueError(f"{file} holds what no such config does: {error}") from error


def _newer_preprocessor(folder: Path, part: str) -> dict[str, Any] | None:
    """A processor in a processor_config.json, which transformers 5 writes: of its limits, `size` counts."""
    found = (_optional_json(folder / "processor_config.json") or {}).get(part)
    if found and found.get("size"):
        found = {key: value for key, value in found.items() if key not in ("min_pixels", "max_pixels")}
    return found


def _leaves(
    vlm: VLM,
    tensors: Mapping[str, np.ndarray],
    released: ModelConfig,
    adapters: Mapping[str, Leaf],
    seed: int,
    source: Path,
) -> tuple[dict[str, Leaf], tuple[str, ...], int]:
    """path -> leaf; the paths that are made new; and how many vocabulary rows are."""
    config = vlm.config
    _check_settings(config, released, source)
    family, known = families.of_model(config), config
    if released.memory is None:
        known = dataclasses.replace(config, memory=None)
    rules = family.name_table(known, family.layout(tensors), None)
    [embedding] = next(rule.names for rule in rules if rule.ours == "decoder/embed")
    rows = len(tensors[embedding]) if embedding in tensors else config.decoder.vocab
    new_rows = max(config.decoder.vocab - rows, 0)
    if new_rows:
        rules = family.name_table(known, family.layout(tensors), rows)
    unread = family.unread(config)
    check_fit(rules, tensors, str(source), unread.match if unread else lambda name: False)
    leaves: dict[str, Leaf] = {rule.ours: FromTensors(rule, tensors) for rule in rules} | dict(adapters)
    dtype = leaves["decoder/embed"].dtype
    if new_rows:
        _extend_vocabulary(leaves, new_rows, seed)
    fresh = [path for path in flatten(vlm.abstract()) if path not in leaves]
    if any(path.startswith("memory/") for path in fresh):
        start = _token_start(leaves, vlm.speech.start_id) if vlm.speech else None
        starts = memory_of(config.memory).starts(config.memory, config.decoder)
        leaves |= _maker(config, start, dtype, seed).leaves
        leaves |= {f"memory/{path}": Started(leaves[f"decoder/layers/{own.path}"], own) for path, own in starts.items()}
    if any(path.startswith("adapters/") for path in fresh):
        made = _adapters_maker(config, dtype, seed).leaves
        leaves |= {path: leaf for path, leaf in made.items() if path in fresh}
    return leaves, tuple(fresh), new_rows


def _maker(config: ModelConfig, start: TokenStart | None, dtype: np.dtype, seed: int) -> Maker:
    """A memory as the model initialises it, piece by piece where it has equal ones; its own tokens start from one that
    there is."""
    decoder, count = memory_of(config.memory).pieces(config.memory, config.decoder) or (None, None)
    config = config if decoder is None else dataclasses.replace(config, decoder=decoder)

    def init(piece):
        rngs = nnx.Rngs(seed if count is None else jax.random.fold_in(jax.random.key(seed), piece))
        memory = make_memory(config, rngs)
        if start is not None:
            memory.adopt(start, rngs.params())
        leaves = flatten({"memory": nnx.to_pure_dict(nnx.state(memory))})
        return {path: (leaf if count is None else leaf[0]).astype(dtype) for path, leaf in leaves.items()}

    return Maker(init, count)


def _adapters_maker(config: ModelConfig, dtype: np.dtype, seed: int) -> Maker:
    """Adapters as the model initialises them."""

    def init(_):
        made = nnx.to_pure_dict(nnx.state(make_adapters(config, nnx.Rngs(seed))))
        return {path: leaf.astype(dtype) for path, leaf in flatten({"adapters": made}).items()}

    return Maker(init)


def _token_start(leaves: Mapping[str, Leaf], token: int) -> TokenStart:
    embed, head = leaves["decoder/embed"], leaves.get("decoder/head/kernel")
    row_D = embed.read((slice(token, token + 1),))[0]
    column_D = row_D if head is None else head.read((slice(None), slice(token, token + 1)))[:, 0]
    sizes = [np.sqrt((slab.astype(np.float32) ** 2).mean(-1)).sum() for slab in embed.slabs(ROWS)]
    return TokenStart(*(jnp.asarray(x, jnp.float32) for x in (row_D, column_D, sum(sizes) / embed.shape[0])))


def _extend_vocabulary(leaves: dict[str, Leaf], count: int, seed: int) -> None:
    """New tokens embed as normal(0, 0.02) and, where the head is apart, score as the mean of the old (CoMemo's way)."""
    embed, head = leaves["decoder/embed"], leaves.get("decoder/head/kernel")
    new = np.random.default_rng(seed).normal(0.0, 0.02, (count, embed.shape[1]))
    leaves["decoder/embed"] = Extended(embed, new, axis=0)
    if head is not None:
        mean_D = np.add.reduce(head.view().T, axis=0, dtype=np.float64) / embed.shape[0]
        leaves["decoder/head/kernel"] = Extended(head, np.repeat(mean_D[:, None], count, axis=1), axis=1)


_FREE = ("vision.drop_path", "vision.layer_scale_init", "decoder.vocab")
"""Keys that may differ from the checkpoint's: they matter to training alone, or to what is made new."""


def _check_settings(config: ModelConfig, released: ModelConfig, source: Path) -> None:
    """Shapes do not tell rotary bases, norms or head counts; a model that differs there would load, and be wrong."""
    parts, free = ["vision", "projector", "decoder"], _FREE
    if released.memory is not None and config.memory_kind == released.memory_kind:
        parts.append("memory")
        free += tuple(f"memory.{key}" for key in memory_of(config.memory).free_keys)
    wrong = []
    for part in parts:
        ours, theirs = to_dict(getattr(config, part)), to_dict(getattr(released, part))
        wrong += [
            f"model.{part}.{key} is {ours[key]!r}, there it is {theirs.get(key)!r}"
            for key in ours
            if ours[key] != theirs.get(key) and f"{part}.{key}" not in free
        ]
    if wrong:
        lines = "\n  ".join(wrong)
        raise ValueError(f"the model differs from {source / CONFIG_FILE}; change one of the two:\n  {lines}")


def _check_leaves(wanted: Mapping[str, tuple], stored: Mapping[str, Leaf], folder: AnyPath) -> None:
    lines = [f"missing: {path}" for path in wanted if path not in stored]
    lines += [f"unknown: {path}" for path in stored if path not in wanted]
    lines += [
        f"wrong shape: {path} is {list(stored[path].shape)}, must be {list(shape)}"
        for path, shape in wanted.items()
        if path in stored and stored[path].shape != shape
    ]
    if lines:
        raise ValueError(f"the parameters in {folder} do not fit its {MODEL_FILE}:\n  " + "\n  ".join(lines))


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike, nbytes: int) -> Iterator[AnyPath]:
    """A folder to write into that gets its name `target` when the block ends well; otherwise nothing stays.

    In a bucket, where nothing can be renamed, it is `target` itself. Raises ValueError if `target` is in use, OSError
    if the disk has no room for `nbytes`.
    """
    target = as_path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder to write to")
    if is_remote(target):
        try:
            yield target
        except BaseException:
            target.rmtree(missing_ok=True)
            raise
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < nbytes:
        raise OSError(f"{target} needs {nbytes / 1e6:,.1f} MB, but its disk has only {free / 1e6:,.1f} MB free")
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        part.chmod(0o755)
        yield part
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _summary(target: str | os.PathLike, leaves: Mapping[str, Leaf], **more) -> Summary:
    parameters = sum(leaf.size for leaf in leaves.values())
    return Summary(as_path(target), parameters, sum(leaf.nbytes for leaf in leaves.values()), **more)


def _optional_json(path: AnyPath) -> dict:
    return read_json(path) if path.is_file() else {}


def _write_json(path: AnyPath, content: Mapping) -> None:
    write_whole(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
