"""Public checkpoints of models of geometry: which model they hold."""

import os
import re
from pathlib import Path

from vlmem_jax.hub import repos
from vlmem_jax.hub.safetensors_io import Tensors
from vlmem_jax.paths import is_remote

MARKS = {"pi3": "register_token", "vggt": "aggregator.camera_token"}
"""A tensor of each model that others lack."""
PI3X = re.compile(r"(.*\.)?mask_token$|(metric|ray|depth|pose)_\w+\b|(point|conf)_head\.(?!proj\.)")
"""Names of tensors that Pi3X has beside those of pi3, or in their place."""


def opened(source: str | os.PathLike) -> tuple[str, Tensors]:
    """What model the checkpoint is of, a name of MARKS, and its tensors.

    `source`: a folder or a .safetensors file on a disk, or a repository of the hub. Raises ValueError where it holds no
    such model, and what `repos.folder` raises.
    """
    if is_remote(source):
        raise ValueError(f"the checkpoint of a model of geometry must lie on a disk; got {source}")
    path = Path(repos.folder(source))
    if not path.exists():
        raise ValueError(f"a model of geometry is a folder or a .safetensors file; there is no {path}")
    tensors = Tensors(path.parent, path.stem) if path.suffix == ".safetensors" else Tensors(path)
    kind = next((kind for kind, mark in MARKS.items() if mark in tensors), None)
    if kind is None:
        marks = ", ".join(f"{mark} ({kind})" for kind, mark in MARKS.items())
        raise ValueError(f"{source} holds no model of geometry that is known here: none of the tensors {marks}")
    if kind == "pi3" and (strange := next(filter(PI3X.match, tensors), None)):
        raise ValueError(
            f"{source} is Pi3X, a later network with convolutional heads, not pi3: it has {strange}; take a checkpoint "
            "of pi3, such as yyfz233/Pi3"
        )
    return kind, tensors
