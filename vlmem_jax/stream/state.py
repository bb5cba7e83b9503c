"""A file of what is kept of a stream: the layout of safetensors, with a description and a checksum in its header."""

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from vlmem_jax.config import to_dict
from vlmem_jax.hub.safetensors_io import DTYPES
from vlmem_jax.models import VLM
from vlmem_jax.paths import as_path, write_whole

VERSION = 1
KIND = "vlmem stream state"
HEAD = struct.Struct("<Q")
"""Bytes of the header, which stand before it."""


def made_by(vlm: VLM, checkpoint: str, parameters: str) -> dict[str, Any]:
    """What a state depends on: the parameters, by their digest, and how frames are seen and kept. `checkpoint` is told
    in errors."""
    config = to_dict(vlm.config)
    settings = {key: config[key] for key in ("vision", "memory", "compute_dtype")}
    return {"checkpoint": checkpoint, "parameters": parameters, "config": json.loads(json.dumps(settings))}


def write_state(file: str | os.PathLike, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    """Writes a file, which appears when it is complete. Raises OSError."""
    about = json.dumps({**about, "version": VERSION}, sort_keys=True)
    metadata = {"kind": KIND, "about": about, "checksum": _checksum(arrays, about)}
    whole = safetensors.numpy.save({name: np.asarray(x, order="C") for name, x in arrays.items()}, metadata)
    write_whole(as_path(file), whole)


def read_state(file: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and description. Raises ValueError, naming the file, for one that is cut short, changed, of another
    version, or no state."""
    path = as_path(file)
    if not path.exists():
        raise ValueError(f"state {file} does not exist")
    content = path.read_bytes()
    try:
        header, arrays = _parsed(content)
        metadata = header.get("__metadata__", {})
        about = json.loads(metadata.get("about", "{}"))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"state {file} is cut short or damaged, or no state of `vlmem stream`: {error}") from error
    if metadata.get("kind") != KIND:
        raise ValueError(f"{file} is no state of `vlmem stream`, but another safetensors file")
    if about.get("version") != VERSION:
        raise ValueError(
            f"state {file} has the format version {about.get('version')}, and this vlmem reads version {VERSION}; "
            "look at the stream again"
        )
    if _checksum(arrays, metadata["about"]) != metadata.get("checksum"):
        raise ValueError(f"state {file} was changed after it was written: its checksum is another; use an older one")
    return arrays, about


def check_made_by(file: str | os.PathLike, about: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises ValueError, naming both, where a state was made by another model or with other settings."""
    both = f"state {file} was made by {about['checkpoint']}, which is not --checkpoint {mine['checkpoint']}"
    theirs, ours = _flat(about["config"]), _flat(mine["config"])
    if differing := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
        keys = "; ".join(f"model.{key} was {theirs.get(key)!r}, here it is {ours.get(key)!r}" for key in differing[:5])
        raise ValueError(f"{both} as it is now: {keys}")
    if about["parameters"] != mine["parameters"]:
        raise ValueError(
            f"{both} as it is now: its parameters had the digest {about['parameters']}, here it is {mine['parameters']}"
        )
    if (theirs := about.get("geometry")) != (ours := mine.get("geometry")):
        raise ValueError(
            f"{both} as it is now: its geometry had the digest {theirs}, here it is {ours}; see --geometry"
        )


def _parsed(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    (size,) = HEAD.unpack_from(content)
    header = json.loads(content[HEAD.size : HEAD.size + size])
    start, arrays = HEAD.size + size, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if start + last > len(content):
            raise ValueError(f"{start + last} bytes are told of, and there are {len(content)}")
        arrays[name] = np.frombuffer(content[start + first : start + last], DTYPES[entry["dtype"]]).reshape(
            entry["shape"]
        )
    return header, arrays


def _checksum(arrays: Mapping[str, np.ndarray], about: str) -> str:
    found = hashlib.blake2b(about.encode(), digest_size=32)
    for name in sorted(arrays):
        x = np.asarray(arrays[name], order="C")
        found.update(repr((name, str(x.dtype), x.shape)).encode())
        found.update(x.view(np.uint8).reshape(-1) if x.ndim else x.tobytes())
    return found.hexdigest()


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    parts = (_flat(part, f"{path}.{name}" if path else name) for name, part in tree.items())
    return {key: leaf for part in parts for key, leaf in part.items()}
